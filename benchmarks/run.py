"""Whole training runs: memory used against the estimate that they print, and how long they waited.

Waiting is for the next batch, as a share of the training time.

    python -m benchmarks.run

Each run is a process of its own, three steps long. The estimate for x070 was fitted to other sizes.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from rwkvtune.data.binidx import BinIdxWriter

VERSIONS = ("x052", "x060", "x070")
SIZES = (  # n_layer, n_embd, vocab_size, ctx_len, micro_bsz, grad_cp, precision
    (3, 384, 8000, 384, 6, False, "bf16"),
    (8, 192, 2000, 512, 8, True, "bf16"),
    (8, 192, 2000, 512, 8, False, "fp32"),
    (5, 320, 65536, 256, 4, True, "fp32"),
    (6, 256, 4000, 512, 4, True, "fp32"),
    (10, 320, 300, 1024, 2, False, "bf16"),
    (2, 192, 66, 256, 4, False, "bf16"),
)
STEPS = 3
TOKENS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for version, size in itertools.product(VERSIONS, SIZES):
            rows.append(measure(Path(folder), args.device, version, *size))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    machine.write(args.out, f"run-{args.device}", machine.describe(args.device) | {"run": rows})


def measure(
    folder: Path, device: str, version: str, n_layer: int, n_embd: int, vocab_size: int,
    ctx_len: int, micro_bsz: int, grad_cp: bool, precision: str,
) -> dict[str, Any]:  # fmt: skip
    """What one run printed about itself."""
    data = folder / f"data-{vocab_size}"
    if not data.with_suffix(".idx").exists():
        with BinIdxWriter(data, vocab_size) as writer:
            writer.add_document(np.random.default_rng(0).integers(1, vocab_size, TOKENS))
    settings = {
        "version": version, "n_layer": n_layer, "n_embd": n_embd, "vocab_size": vocab_size,
        "ctx_len": ctx_len, "micro_bsz": micro_bsz, "grad_cp": grad_cp, "precision": precision,
    }  # fmt: skip
    flags = settings | {
        "data_file": data, "accelerator": device, "exit_tokens": STEPS * micro_bsz * ctx_len,
        "proj_dir": tempfile.mkdtemp(dir=folder),
    }  # fmt: skip
    command = [sys.executable, "-m", "rwkvtune", "train"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, estimated = map(float, find(r"memory used (\S+) GB, estimated (\S+) GB", told))
    (waited,) = find(r"waited for data during (\S+)%", told)
    return settings | {
        "used_gb": used,
        "estimated_gb": estimated,
        "estimated_over_used": round(estimated / used, 3),
        "waited_for_data_percent": float(waited),
    }


def find(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the run did not print {pattern!r}:\n{text}")
    return found.groups()


if __name__ == "__main__":
    main()
