"""From the bundled text to a trained model, a picture and a sample.

Uses nothing that a user's own run could not: data.build, the training loop with recipe.yaml beside
this file, and inference. Run again, it goes on where it was stopped, or shows what it reached.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).parent
TEXT = HERE / "tinyshakespeare.txt"
RECIPE = HERE / "recipe.yaml"
SAMPLE_CHARACTERS = 600


def run_demo(folder: Path) -> int:
    """Train into `folder`, or go on there; show the result. Returns the exit code."""
    from rwkvtune.training.config import TrainConfig
    from rwkvtune.training.lm import train_language_model

    settings = yaml.safe_load(RECIPE.read_text())
    settings |= _data(folder) | {"proj_dir": str(folder), "precision": faster_precision(folder)}
    result = train_language_model(TrainConfig.from_flat(settings))
    if result.exit_code:
        return result.exit_code
    _show(folder)
    return 0


def _data(folder: Path) -> dict[str, str]:
    """Token files of the bundled text, one character a token, the last tenth for validation; made
    once."""
    from rwkvtune.data.build import build_token_files

    prefix = folder / "data" / "shakespeare"
    paths = {"data_file": str(prefix), "val_data_file": f"{prefix}_val"}
    if not all(Path(f"{p}.{end}").exists() for p in paths.values() for end in ("bin", "idx")):
        build_token_files(TEXT, prefix, "chars", val_share=0.1)
    return paths


def faster_precision(folder: Path) -> str:
    """bf16 where this machine multiplies it faster than fp32; a run that exists keeps what it began
    with."""
    config = folder / "config.yaml"
    if config.exists():
        return str(yaml.safe_load(config.read_text())["precision"])
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        best = math.inf
        for _ in range(8):
            begin = time.perf_counter()
            x @ w
            best = min(best, time.perf_counter() - begin)
        return best

    return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"


def _show(folder: Path) -> None:
    """A sample, what to do next, and the line that says how good the model is."""
    from rwkvtune.data.tokenizers import find_tokenizer
    from rwkvtune.inference.generate import generate, stream_text
    from rwkvtune.inference.load import load_model
    from rwkvtune.training.log import read_metrics

    weights = folder / "rwkv-final.pth"
    model, tokenizer = load_model(weights), find_tokenizer(folder)
    assert tokenizer is not None, f"{folder} was written by a run with a tokenizer"
    ids = generate(
        model, tokenizer.encode("\n"), max_tokens=SAMPLE_CHARACTERS, temperature=0.8, seed=1
    )
    print("\nWhat the model writes:\n")
    for piece in stream_text(tokenizer, ids):
        print(piece, end="", flush=True)
    python = shown_path(Path(sys.executable))
    print(
        f"""

Next:
  look at       {folder / "loss_curve.png"}, {folder / "metrics.csv"}, {folder / "train_log.txt"}
  see it drawn  {python} -m rwkvtune report {folder}
  train longer  {python} -m rwkvtune train --config {folder / "config.yaml"} --exit_tokens 4000000
  use it        {python} -c "import rwkvtune; model = rwkvtune.load('{weights}')"
  your own text README.md, "Train on your own text"
"""
    )
    last = [
        row.values for row in read_metrics(folder / "metrics.csv") if row.values["val_loss"] > 0
    ][-1]
    nats, seconds, tokens = last["val_loss"], last["seconds"], last["tokens"]
    print(
        f"demo: validation loss {nats:.4f} nats/char ({nats / math.log(2):.4f} bits/char) "
        f"after {seconds:.0f} s of training at {tokens / seconds:.0f} tokens/s"
    )


def shown_path(path: Path) -> Path:
    """Relative to the working folder where the file lies below it, so that a line stays short."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
