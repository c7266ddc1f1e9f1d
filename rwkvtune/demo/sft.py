"""From the bundled text to a model that follows small instructions, checked to the letter.

Uses nothing that a user's own run could not: data.build, pretraining and fine-tuning with
sft_recipe.yaml beside this file, and evaluation. Run again, it goes on where it was stopped, or
shows what it reached.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rwkvtune.demo.run import TEXT, faster_precision, shown_path
from rwkvtune.demo.tasks import TASKS, write_tasks

if TYPE_CHECKING:
    from rwkvtune.models.frame import LanguageModel

RECIPE = Path(__file__).parent / "sft_recipe.yaml"
CONVERSATIONS = 20_000
PASSING = 0.5
"""Share of exact answers after fine-tuning, over all tasks, that makes the demo a success."""


def run_sft_demo(folder: Path) -> int:
    """Train into `folder`, or go on there; show the result. Returns the exit code: 1 when too few
    held-out answers are right."""
    import torch

    from rwkvtune.inference.load import load_model
    from rwkvtune.training.config import TrainConfig
    from rwkvtune.training.lm import train_language_model
    from rwkvtune.training.sft import fine_tune
    from rwkvtune.training.sft_config import SFTConfig

    recipe = yaml.safe_load(RECIPE.read_text())
    base, tuned = folder / "base", folder / "tuned"
    precision = {"precision": faster_precision(base)}
    print(f"1. Pretrain on the bundled text, into {base}")
    settings = recipe["base"] | precision
    settings |= {"data_file": str(_text(folder)), "proj_dir": str(base)}
    result = train_language_model(TrainConfig.from_flat(settings))
    if result.exit_code:
        return result.exit_code
    training, held_out = folder / "data" / "tasks.jsonl", folder / "data" / "held_out.jsonl"
    if not (training.exists() and held_out.exists()):
        write_tasks(training, held_out, count=CONVERSATIONS)
    print(f"\n2. Fine-tune on {training}, into {tuned}")
    settings = recipe["tuned"] | precision | {"load_model": str(base / "rwkv-final.pth")}
    settings |= {"data_file": str(training), "val_data_file": str(held_out)}
    result = fine_tune(SFTConfig.from_flat(settings | {"proj_dir": str(tuned)}))
    if result.exit_code:
        return result.exit_code
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = (
        exact_match(load_model(run / "rwkv-final.pth", device=device), held_out)
        for run in (base, tuned)
    )
    return _show(folder, held_out, before, after)


def _text(folder: Path) -> Path:
    """Prefix of the token files of the bundled text, one byte a token; made once."""
    from rwkvtune.data.build import build_token_files

    prefix = folder / "data" / "shakespeare"
    if not all(Path(f"{prefix}.{end}").exists() for end in ("bin", "idx")):
        build_token_files(TEXT, prefix, "bytes")
    return prefix


def exact_match(
    model: LanguageModel, held_out: Path, tasks: Collection[str] = TASKS
) -> dict[str, float]:
    """Share of the held-out questions of each task that the model answers exactly."""
    from rwkvtune.data.chat import load_template
    from rwkvtune.data.chat_batches import batch_of
    from rwkvtune.data.chat_samples import read_samples
    from rwkvtune.data.tokenizers import load_tokenizer
    from rwkvtune.evaluation.exact_match import exact_matches

    samples, _ = read_samples(
        str(held_out),
        load_tokenizer("bytes"),
        load_template("g1"),
        ctx_len=256,
        on_bad_sample="error",
    )
    device = model.emb.weight.device
    batches = (batch_of(samples, [[n]]) for n in range(len(samples)))
    right = list(exact_matches(model, batches, device=device))
    return {  # the tasks take turns in the file
        task: sum(right[i :: len(tasks)]) / len(right[i :: len(tasks)])
        for i, task in enumerate(tasks)
    }


def _show(folder: Path, held_out: Path, before: dict[str, float], after: dict[str, float]) -> int:
    """The table, what to do next, and the line that says how good the model is."""
    mean_before, mean_after = (_mean(list(share.values())) for share in (before, after))
    lines = [f"{'exact answers to held-out questions':<38}{'before':>8}{'after':>8}"]
    lines += [f"  {task:<36}{before[task]:>8.1%}{after[task]:>8.1%}" for task in TASKS]
    lines.append(f"  {'all':<36}{mean_before:>8.1%}{mean_after:>8.1%}")
    python = shown_path(Path(sys.executable))
    tuned = folder / "tuned"
    print("\n" + "\n".join(lines))
    print(
        f"""
Next:
  talk to it     {python} -m rwkvtune chat {tuned} --temperature 0
                 (try: reverse stone; it knows single questions, so /reset before another)
  see the mask   {python} -m rwkvtune sft --preview 3 --data_file {held_out} --tokenizer bytes
  your own data  docs/fine-tuning.md
"""
    )
    print(f"demo sft: held-out exact match {mean_before:.3f} before, {mean_after:.3f} after")
    if mean_after < PASSING:
        print(f"that is less than {PASSING}: something is wrong")
        return 1
    return 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
