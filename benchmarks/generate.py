"""Speed of generation, one token after another: ratios within one run, since machines differ.

    python -m benchmarks.generate [--precision fp32 bf16] [--repeats 60] [--out benchmarks/results]

Beside a token of our model run, in turn, the same token of the `rwkv` package on the same weights
file, and the bare products of the model's matrices with one vector. `efficiency` is the share of
our time that these products take. `generate_tokens_per_s` is the whole loop with sampling.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import machine
from rwkvtune.checkpoint import save_weights
from rwkvtune.inference.generate import generate
from rwkvtune.inference.load import load_model
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.frame import LanguageModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELS = [RWKV7Config(66, 2, 192), RWKV7Config(65536, 12, 768)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for config in MODELS:
            path = Path(folder) / f"L{config.n_layer}.pth"
            save_weights(path, build_model(config, seed=0).state_dict())
            rows += [measure(path, precision, args.repeats) for precision in args.precision]
    result = machine.describe("cpu") | {"rwkv_package": rwkv_version(), "token": rows}
    machine.write(args.out, "generate-cpu", result)


def measure(path: Path, precision: str, repeats: int) -> dict[str, Any]:
    """One row of the result: milliseconds per token of each, and the ratios."""
    model = load_model(path, dtype=DTYPES[precision])
    works: dict[str, Callable[[], object]] = {
        "ours": our_token(model),
        "bare": bare_products(model),
    }
    if rwkv_version():
        works["rwkv"] = their_token(path, precision)
    taken = machine.interleaved(works, "cpu", repeats)
    begin = time.perf_counter()
    written = len(list(generate(model, [1], max_tokens=repeats, seed=1)))
    seconds = time.perf_counter() - begin
    config = model.config
    row: dict[str, Any] = {
        "precision": precision,
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "token_ms": round(taken["ours"], 3),
        "bare_products_ms": round(taken["bare"], 3),
        "efficiency": round(taken["bare"] / taken["ours"], 3),
        "tokens_per_s": round(1e3 / taken["ours"], 1),
        "generate_tokens_per_s": round(written / seconds, 1),
    }
    if "rwkv" in taken:
        row["rwkv_package_ms"] = round(taken["rwkv"], 3)
        row["speed_over_rwkv_package"] = round(taken["rwkv"] / taken["ours"], 3)
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def our_token(model: LanguageModel) -> Callable[[], None]:
    """One token after the one before, with its state."""
    state = None
    ids = torch.tensor([[1]])

    def token() -> None:
        nonlocal state
        with torch.no_grad():
            _, state = model(ids, state)

    return token


def bare_products(model: LanguageModel) -> Callable[[], None]:
    """The matrices that a token is multiplied with, laid out as the model has them."""
    pairs = []
    for name, p in model.named_parameters():
        if p.squeeze().dim() == 2 and name != "emb.weight" and not name.endswith(".r_k"):
            matrix = p if name.endswith(".weight") else p.T
            pairs.append((torch.ones(1, 1, matrix.shape[1], dtype=p.dtype), matrix))

    def products() -> None:
        with torch.no_grad():
            for x, matrix in pairs:
                F.linear(x, matrix)

    return products


def their_token(path: Path, precision: str) -> Callable[[], None]:
    """The same of the `rwkv` package, which reads its settings when it is imported."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    model = RWKV(model=str(path.with_suffix("")), strategy=f"cpu {precision}")
    state = None

    def token() -> None:
        nonlocal state
        _, state = model.forward([1], state)

    return token


def rwkv_version() -> str | None:
    """Of the `rwkv` package; None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version("rwkv")
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
