"""What vision training spends on data, logits and the encoder: ratios within one run.

    python -m benchmarks.vision [--repeats 5] [--out benchmarks/results]

`waiting`: share of the training time of a run of the demo's size that waits for data, with one
thread that reads pictures. `head`: memory that the head and loss add, with all logits, with all
positions a block at a time, and with the positions that have a label alone, at the shape of a
caption batch. `encoder`: pictures per second, a batch at once against one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import machine
from rwkvtune.demo.pictures import SIDE, write_data
from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.vision.model import labelled_rows
from rwkvtune.models.vision.tiny import save_siglip, tiny_siglip

B, T, LABELS, C, V = 4, 768, 20, 256, 65536
"""Samples, tokens and learned tokens of each, width, vocabulary."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--head", choices=["all logits", "in blocks", "labels only"])
    args = parser.parse_args()
    if args.head:  # a process of its own, for its peak of memory
        print(head_memory(args.head))
        return
    result = machine.describe("cpu") | {
        "waiting": waiting(),
        "head": heads(),
        "encoder": encoder(args.repeats),
    }
    machine.write(args.out, "vision-cpu", result)


def waiting() -> dict[str, Any]:
    from rwkvtune.checkpoint import save_weights
    from rwkvtune.training.vision import train_vision
    from rwkvtune.training.vision_config import from_flat

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", pictures=400, seed=1)
        save_siglip(tiny_siglip(side=SIDE, patch=8, width=64), folder / "encoder", side=SIDE)
        save_weights(folder / "llm.pth", build_model(RWKV7Config(320, 3, 128), seed=0).state_dict())
        settings = {
            "load_model": str(folder / "llm.pth"), "encoder_path": str(folder / "encoder"),
            "data_file": str(folder / "data"), "proj_dir": str(folder / "run"),
            "tokenizer": str(folder / "data" / "vocabulary.txt"), "micro_bsz": 16,
            "epoch_steps": 60, "ctx_len": 128, "num_workers": 1,
        }  # fmt: skip
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert train_vision(from_flat(settings)) == 0
    found = re.search(r"waited for data during ([\d.]+)%", said.getvalue())
    assert found is not None, said.getvalue()
    return {"num_workers": 1, "micro_bsz": 16, "share_of_time": float(found[1]) / 100}


def heads() -> dict[str, Any]:
    megabytes = {}
    for kind in ("all logits", "in blocks", "labels only"):
        command = [sys.executable, "-m", "benchmarks.vision", "--head", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        megabytes[kind] = round(float(done.stdout.split()[-1]), 1)
    shape = {"B": B, "T": T, "labels": B * LABELS, "C": C, "V": V}
    return {"shape": shape, "added_megabytes": megabytes}


def head_memory(kind: str) -> float:
    """Megabytes that a forward and backward pass of head and loss add at their peak."""
    from rwkvtune.training.memory import PeakMemory

    hidden = torch.randn(B, T, C, requires_grad=True)
    weight = torch.randn(V, C)
    targets = torch.full((B, T), -100)
    targets[:, -LABELS:] = torch.randint(0, V, (B, LABELS))
    memory = PeakMemory("cpu")
    if kind == "all logits":
        logits = (hidden @ weight.T).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    elif kind == "in blocks":
        loss = head_cross_entropy(hidden, weight, targets, l2wrap=0.0)
    else:
        rows, wanted = labelled_rows(hidden, targets, -100)
        loss = head_cross_entropy(rows, weight, wanted, l2wrap=0.0)
    loss.backward()
    used = memory.used()
    assert used is not None, "needs Linux's account of the process"
    return (used - memory.before) / 1e6


def encoder(repeats: int) -> dict[str, Any]:
    from rwkvtune.inference.vision import open_encoder

    count, rows = 32, []
    for side, patch, width, layers in ((48, 8, 64, 2), (224, 16, 192, 4)):
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_siglip(side=side, patch=patch, width=width, layers=layers)
            save_siglip(model, Path(folder), side=side)
            eye, _ = open_encoder(folder, "siglip", torch.float32)
        pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)

        def batched(eye: Any = eye, pixels: Any = pixels) -> None:
            eye(pixels)

        def one_by_one(eye: Any = eye, pixels: Any = pixels) -> None:
            for picture in pixels.split(1):
                eye(picture)

        taken = machine.interleaved({"batched": batched, "one by one": one_by_one}, "cpu", repeats)
        rows.append(
            {
                "side": side, "patch": patch, "width": width, "layers": layers,
                "batch": count,
                "batched_per_s": round(count / taken["batched"] * 1e3, 1),
                "one_by_one_per_s": round(count / taken["one by one"] * 1e3, 1),
                "ratio": round(taken["one by one"] / taken["batched"], 2),
            }
        )  # fmt: skip
    return {"sizes": rows}


if __name__ == "__main__":
    main()
