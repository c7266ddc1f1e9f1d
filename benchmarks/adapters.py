"""Adapters, packed bases and optimizers: time of a step against full fine-tuning, and memory.

    python -m benchmarks.adapters                    # this machine's CPU
    python -m benchmarks.adapters --only step        # or memory, length, optimizers
    python -m benchmarks.adapters --device cuda

`step`: forward, backward, clip and optimizer at L12 D768, in turn with that of full fine-tuning;
`ratio` is the time over full fine-tuning's.  `memory`: bytes of a process per number of the model
while it trains on so few tokens that activations hardly count, and the most until it begins to,
from a base in bf16, each combination in a process of its own.  `length`: peak memory of LoRA on
rows of 1 and of 64 pieces of chunk_len tokens.  The result of a part alone goes into a file of its
own.
`optimizers`: the model and text of `make demo`, trained by each optimizer on the same batches, in
turn step by step, so that a slow moment of the machine hits all alike: validation loss by step and
by the seconds that each has taken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks import machine
from rwkvtune.adapters.adapter import attach
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.data.batch import Batch
from rwkvtune.demo.run import RECIPE, TEXT
from rwkvtune.models import RWKV7Config, build_model, fill_model
from rwkvtune.models.frame import LanguageModel
from rwkvtune.training.config import OptimizerOptions
from rwkvtune.training.lm import next_token_loss
from rwkvtune.training.loop import clip_gradients
from rwkvtune.training.memory import PeakMemory, keep_freed_memory
from rwkvtune.training.optim import Kind, build_optimizer, set_hyperparameters

PARTS = ("step", "memory", "length", "optimizers")
CHUNK = 256
OPTIMIZERS: tuple[Kind, ...] = ("adamw", "muon", "adamw8bit")
STEPPED = ("full", "lora", "lora nf4", "lora int8", "dora", "miss", "state")
REMEMBERED: tuple[tuple[str, Kind, bool], ...] = (
    ("full", "adamw", False),
    ("full", "adamw", True),
    ("full", "adamw8bit", False),
    ("full", "adamw8bit", True),
    ("full", "muon", False),
    ("full", "muon", True),
    ("lora", "adamw", False),
    ("lora", "adamw8bit", True),
    ("lora int8", "adamw", False),
    ("lora nf4", "adamw", False),
    ("lora nf4", "adamw8bit", True),
    ("dora", "adamw", False),
    ("miss", "adamw", False),
    ("state", "adamw", False),
    ("state nf4", "adamw", False),
)
"""(what is trained, optimizer, whether it steps inside the backward pass)."""
REMEMBERED_MODEL = RWKV7Config(vocab_size=16384, n_layer=12, n_embd=768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="of each optimizer")
    parser.add_argument("--micro_bsz", type=int, default=2)
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(memory_of(**json.loads(args.alone))))
        return
    result = machine.describe(args.device)
    if "step" in args.only:
        result["step"] = measure_steps(
            args.device, micro_bsz=args.micro_bsz, ctx_len=args.ctx_len, repeats=args.repeats
        )
    if "memory" in args.only:
        result["memory"] = measure_memory(args.device)
    if "length" in args.only:
        result["length"] = measure_length(args.device)
    if "optimizers" in args.only:
        result["optimizers"] = compare_optimizers(args.device, args.steps)
    parts = [] if set(args.only) == set(PARTS) else args.only
    machine.write(args.out, "-".join(["adapters", *parts, args.device]), result)


def measure_steps(
    device: str, *, micro_bsz: int, ctx_len: int, repeats: int, vocab_size: int = 16384
) -> list[dict[str, Any]]:
    """Rows of `step`, bf16: one model for each kind of training, all in memory at once."""
    config = RWKV7Config(vocab_size=vocab_size, n_layer=12, n_embd=768)
    ids = torch.randint(vocab_size, (micro_bsz, ctx_len + 1), device=device)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    if device == "cpu":
        keep_freed_memory()
    steps: dict[str, Callable[[], object]] = {
        what: training_step(config, what, device, [batch]) for what in STEPPED
    }
    taken = machine.interleaved(steps, device, repeats)
    rows = [
        {"what": what, "step_ms": round(ms, 1), "ratio": round(ms / taken["full"], 3)}
        for what, ms in taken.items()
    ]
    for row in rows:
        print(row)
    return rows


def training_step(
    config: RWKV7Config,
    what: str,
    device: str,
    batches: list[Batch],
    *,
    kind: Kind = "adamw",
    in_backward: bool = False,
    base: Mapping[str, Tensor] | None = None,
) -> Callable[[], None]:
    """A whole optimizer step of `what`, such as "full" or "lora nf4", as the loop does it in
    bf16.

    base: weights to begin with, as a run would load them; None = random ones.
    """
    peft, _, quant = what.partition(" ")
    with torch.device(device if base is None else "cpu"):
        model = build_model(config, initial_values=False)
    if base is None:
        randomize(model)
    else:
        fill_model(model, base, "base.pth", copy=not quant)
    if peft != "full":
        settings = AdapterSettings(peft, quant=quant or "none")
        attach(model, settings, "base.pth", compute_dtype=torch.bfloat16)
    model.to(device)
    optimizer = build_optimizer(
        model.named_parameters(),
        lr_init=1e-4,
        betas=(0.9, 0.99),
        eps=1e-18,
        weight_decay=0.1,
        kind=kind,
        in_backward=in_backward,
    )
    set_hyperparameters(optimizer, lr=1e-4, weight_decay=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        backward(model, device, batches)
        if not in_backward:
            clip_gradients(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def randomize(model: LanguageModel) -> None:
    """Values of the right size: published initial ones take longer than all steps."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)


def backward(model: LanguageModel, device: str, batches: list[Batch]) -> None:
    targets = sum(batch.target_tokens for batch in batches)
    carry: Any = None
    for batch in batches:
        with torch.autocast(device, torch.bfloat16):
            loss, _, carry, _ = next_token_loss(model, batch, carry, OptimizerOptions())
        (loss / targets).backward()


def compare_optimizers(device: str, steps: int) -> list[dict[str, Any]]:
    """Rows of `optimizers`, at every eighth of the run."""
    recipe = yaml.safe_load(RECIPE.read_text())
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    _, ids = text.unique(return_inverse=True)
    split = len(ids) * 9 // 10
    vocab_size = int(ids.max()) + 1
    config = RWKV7Config(vocab_size, recipe["n_layer"], recipe["n_embd"])
    bsz, length = recipe["micro_bsz"], recipe["ctx_len"]
    dice = torch.Generator().manual_seed(0)

    def batch_at(starts: Tensor) -> Batch:
        rows = torch.stack([ids[s : s + length + 1] for s in starts.tolist()]).to(device)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    held_out = batch_at(split + torch.arange(0, 40 * length, length))
    lr, least = recipe["lr_init"], recipe["lr_final"]
    models, optimizers, seconds = {}, {}, dict.fromkeys(OPTIMIZERS, 0.0)
    for kind in OPTIMIZERS:
        with torch.device(device):
            models[kind] = build_model(config, seed=0)
        optimizers[kind] = build_optimizer(
            models[kind].named_parameters(),
            lr_init=lr,
            betas=(0.9, 0.99),
            eps=1e-18,
            weight_decay=recipe["weight_decay"],
            kind=kind,
        )
    rows = []
    for step in range(steps):
        batch = batch_at(torch.randint(split - length - 1, (bsz,), generator=dice))
        now = least + (lr - least) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for kind in OPTIMIZERS:
            model, optimizer = models[kind], optimizers[kind]
            set_hyperparameters(
                optimizer, lr=now * min(1, (step + 1) / 20), weight_decay=recipe["weight_decay"]
            )

            def work(model: Any = model, optimizer: Any = optimizer) -> None:
                backward(model, device, [batch])  # noqa: B023, run at once
                clip_gradients(list(model.parameters()), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            seconds[kind] += machine.milliseconds(work, device) / 1e3
        if (step + 1) % (steps // 8) == 0:
            for kind in OPTIMIZERS:
                with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                    loss, tokens, _, _ = next_token_loss(
                        models[kind], held_out, None, OptimizerOptions()
                    )
                rows.append(
                    {
                        "optimizer": kind,
                        "step": step + 1,
                        "val_loss": round(float(loss) / tokens, 4),
                        "seconds": round(seconds[kind], 1),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def measure_memory(device: str) -> list[dict[str, Any]]:
    """Rows of `memory`."""
    model = build_model(REMEMBERED_MODEL, initial_values=False)
    randomize(model)
    with tempfile.TemporaryDirectory() as folder:
        base = str(Path(folder) / "base.safetensors")
        save_weights(base, model.state_dict(), dtype="bf16")
        del model
        return [
            alone(device=device, what=what, kind=kind, in_backward=inside, chunks=0, base=base)
            for what, kind, inside in REMEMBERED
        ]


def measure_length(device: str) -> list[dict[str, Any]]:
    """Rows of `length`."""
    return [
        alone(device=device, what="lora", kind="adamw", in_backward=False, chunks=chunks)
        for chunks in (1, 64)
    ]


def alone(**what: Any) -> dict[str, Any]:
    """memory_of in a process of its own, which returns what is freed at once: its peak is what was
    alive."""
    command = [sys.executable, "-m", "benchmarks.adapters", "--alone", json.dumps(what)]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(row)
    return row


def memory_of(
    *, device: str, what: str, kind: Kind, in_backward: bool, chunks: int, base: str = ""
) -> dict[str, Any]:
    """Bytes that three steps add to the process, and those that getting there does.

    chunks: pieces of CHUNK tokens in a row; 0 = 16 tokens, for the bytes per number of the model.
    base: weights file to begin with; empty = random weights.
    """
    if chunks:
        config = RWKV7Config(vocab_size=256, n_layer=4, n_embd=256)
        ids = torch.randint(256, (1, CHUNK * chunks + 1), device=device)
    else:
        config = REMEMBERED_MODEL
        ids = torch.randint(256, (1, 17), device=device)
    batches = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).chunks(CHUNK)
    # What is loaded once and is not memory for training: kernels, and libraries that come late.
    tiny = RWKV7Config(vocab_size=64, n_layer=1, n_embd=64)
    few = [Batch(ids[:, :4] % 64, ids[:, :4] % 64)]
    training_step(tiny, what, device, few, kind=kind, in_backward=in_backward)()
    memory = PeakMemory(device)
    before = memory.before if device == "cpu" else torch.cuda.memory_allocated()
    weights = load_weights(base) if base else None
    step = training_step(
        config, what, device, batches, kind=kind, in_backward=in_backward, base=weights
    )
    loading = (memory.used() or 0) - before
    machine.forget_peak_memory(device)
    for _ in range(3):
        step()
    used = (memory.used() or 0) - before
    row = {"what": what, "optimizer": kind, "fused_backward": in_backward}
    if chunks:
        return {"what": what, "tokens": CHUNK * chunks, "chunk_len": CHUNK, "mb": used // 10**6}
    return row | {
        "mb": used // 10**6,
        "bytes_per_number": round(used / config.num_parameters, 2),
        "loading_mb": loading // 10**6,
    }


if __name__ == "__main__":
    main()
