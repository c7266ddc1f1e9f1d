"""How much of the machine's matrix speed a whole training step reaches.

    python -m benchmarks.train_step                        # this machine's CPU, fp32 and bf16
    python -m benchmarks.train_step --version x052 x060    # others than x070
    python -m benchmarks.train_step --device cuda --precision bf16 --n_layer 12

The step is forward, backward, clip and optimizer of the real model. Beside it, in turn, run the
bare matrix products of that step: for each weight matrix x Wᵀ, g W and gᵀ x on contiguous tensors
of the same shapes and type. `efficiency` is the ratio of the two times, which is the ratio of their
FLOP/s on the same FLOP.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from rwkvtune.inference.load import IN_NO_PRODUCT
from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy
from rwkvtune.kernels.working_weights import keep_copies, write_copies
from rwkvtune.models import CONFIG_CLASSES, CONFIGS, ModelConfig, build_model
from rwkvtune.models.rwkv7.config import UNUSED
from rwkvtune.training.loop import clip_gradients
from rwkvtune.training.memory import keep_freed_memory
from rwkvtune.training.optim import build_optimizer, set_hyperparameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARE_ROWS = 16384
"""Tokens of the bare products; more would only take memory, so their time is scaled up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--version", nargs="+", default=["x070"], choices=list(CONFIG_CLASSES))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    for name, default in (("n_layer", 4), ("n_embd", 768), ("vocab_size", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro_bsz", type=int, default=4)
    parser.add_argument("--ctx_len", type=int, default=512)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--keep_weights", action="store_true", help="as working_weights=kept")
    parser.add_argument("--grad_cp", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()  # as a run does
    rows = [
        measure(
            CONFIG_CLASSES[version](args.vocab_size, args.n_layer, args.n_embd),
            precision,
            device=args.device,
            micro_bsz=args.micro_bsz,
            ctx_len=args.ctx_len,
            grad_cp=args.grad_cp,
            repeats=args.repeats,
            accumulate=args.accumulate,
            keep_weights=args.keep_weights,
        )
        for version in args.version
        for precision in args.precision
    ]
    name = "-".join(["train-step", *(v for v in args.version if v != "x070"), args.device])
    machine.write(args.out, name, machine.describe(args.device) | {"step": rows})


def measure(
    config: ModelConfig,
    precision: str,
    *,
    device: str,
    micro_bsz: int,
    ctx_len: int,
    grad_cp: bool,
    repeats: int,
    accumulate: int = 1,
    keep_weights: bool = False,
) -> dict[str, Any]:
    """One row of the result: times, tokens per second, and the share of the matrix speed
    reached."""
    training = Training(config, precision, device)
    if keep_weights:
        keep_copies(training.trained)
    row = {"working_weights": "kept" if keep_weights else "cast"}
    return row | training.measured(
        micro_bsz=micro_bsz,
        ctx_len=ctx_len,
        grad_cp=grad_cp,
        repeats=repeats,
        accumulate=accumulate,
    )


class Training:
    """A model and its optimizer on their device, for steps on random tokens as the loop does
    them."""

    def __init__(self, config: ModelConfig, precision: str, device: str) -> None:
        self.config, self.precision, self.device = config, precision, device
        with torch.device(device):
            self.model = build_model(config, initial_values=False)
        with torch.no_grad():
            # Published initial values cost more time than the steps, and many of them are zeros,
            # which a GPU multiplies faster than other numbers.
            for parameter in self.model.parameters():
                parameter.normal_(std=0.02)
        self.optimizer = build_optimizer(
            self.model.named_parameters(),
            lr_init=1e-4,
            betas=(0.9, 0.99),
            eps=1e-18,
            weight_decay=0.1,
        )
        set_hyperparameters(self.optimizer, lr=1e-4, weight_decay=0.1)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def step(self, micro_bsz: int, ctx_len: int, accumulate: int = 1) -> Callable[[], None]:
        """A whole optimizer step."""
        shape = (accumulate, micro_bsz, ctx_len + 1)
        ids = torch.randint(self.config.vocab_size, shape, device=self.device)
        batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]

        def step() -> None:
            for inputs, targets in batches:
                with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                    loss, _ = self.model(inputs, head=partial(head_cross_entropy, targets=targets))
                (loss / targets.numel() / accumulate).backward()
            clip_gradients(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            write_copies(self.trained)

        return step

    def measured(
        self,
        *,
        micro_bsz: int,
        ctx_len: int,
        grad_cp: bool,
        repeats: int = 3,
        accumulate: int = 1,
    ) -> dict[str, Any]:
        """A row of `measure`."""
        config, device = self.config, self.device
        self.model.grad_cp = grad_cp
        step = self.step(micro_bsz, ctx_len, accumulate)
        tokens = micro_bsz * ctx_len
        rows = min(tokens, BARE_ROWS)
        dtype = DTYPES[self.precision]
        measured: dict[str, Any] = {}
        if device == "cpu":
            bare = bare_products(config, dtype, device, rows)
            taken = machine.interleaved({"step": step, "bare": bare}, device, repeats)
        else:  # apart: operands of the bare products would lie beside a step that fills the device
            torch.cuda.reset_peak_memory_stats()
            taken = machine.interleaved({"step": step}, device, repeats)
            measured["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            torch.cuda.empty_cache()
            bare = bare_products(config, dtype, device, rows)
            taken |= machine.interleaved({"bare": bare}, device, repeats)
            torch.cuda.empty_cache()
        bare_ms = taken["bare"] * accumulate * tokens / rows
        flop = 6 * config.matmul_parameters * accumulate * tokens
        peak = machine.data_sheet_tflops(device, dtype)
        if peak:
            measured["share_of_data_sheet"] = round(flop / taken["step"] / 1e9 / peak, 4)
        row = {
            "version": config.version,
            "precision": self.precision,
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "vocab_size": config.vocab_size,
            "micro_bsz": micro_bsz,
            "accumulate": accumulate,
            "ctx_len": ctx_len,
            "grad_cp": grad_cp,
            "step_ms": round(taken["step"], 2),
            "bare_products_ms": round(bare_ms, 2),
            "tokens_per_s": round(accumulate * tokens / taken["step"] * 1e3),
            "bare_gflop_per_s": round(flop / bare_ms / 1e6, 1),
            "efficiency": round(bare_ms / taken["step"], 4),
            **measured,
        }
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        return row

    def measured_at_most(
        self, most: int, *, ctx_len: int, grad_cp: bool, repeats: int
    ) -> dict[str, Any] | None:
        """A row of `measure` with the largest micro-batch up to `most` that fits; None if none
        does."""
        micro_bsz = largest(lambda n: self.fits(n, ctx_len, grad_cp), most)
        while micro_bsz:
            try:
                return self.measured(
                    micro_bsz=micro_bsz, ctx_len=ctx_len, grad_cp=grad_cp, repeats=repeats
                )
            except RuntimeError as error:  # one step had room, several leave gaps
                if not is_out_of_memory(error):
                    raise
            self.free()
            micro_bsz = micro_bsz * 7 // 8
        return None

    def fits(self, micro_bsz: int, ctx_len: int, grad_cp: bool) -> bool:
        """Whether a step of this size has room on the device."""
        self.model.grad_cp = grad_cp
        try:
            self.step(micro_bsz, ctx_len)()
            machine.synchronize(self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.free()
        return True

    def free(self) -> None:
        """Drop gradients, and what a step that failed has left."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()  # a graph that an error cut short refers to itself
        if self.device == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error, or what the driver, cuBLAS and Triton say where torch has taken all."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, to an eighth of itself; 0 if 1 does not."""
    if not fits(1):
        return 0
    good, bad = 1, most + 1
    while bad - good > max(1, good // 8):
        middle = min(2 * good, (good + bad) // 2)
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def bare_products(
    config: ModelConfig, dtype: torch.dtype, device: str, tokens: int
) -> Callable[[], None]:
    """The matrix products of a step and nothing else: forward, and both gradients, of every
    weight."""
    shapes = []  # of xs [tokens, k] and their products [tokens, n]
    for name, shape in CONFIGS[config.version].tensor_shapes(config).items():
        if shape[0] == 1 or len(shape) < 2 or name in UNUSED or name.endswith(IN_NO_PRODUCT):
            continue
        *number, rows, columns = shape
        k_and_n = (columns, rows) if name.endswith(".weight") else (rows, columns)
        shapes += [k_and_n] * math.prod(number)
    assert sum(k * n for k, n in shapes) == config.matmul_parameters
    operands: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    for k, n in set(shapes):
        x, g = (torch.randn(tokens, width, device=device).to(dtype) for width in (k, n))
        operands[k, n] = x, torch.randn(n, k, device=device).to(dtype), g

    def products() -> None:
        for shape in shapes:
            x, w, g = operands[shape]
            x @ w.T
            g @ w
            g.T @ x

    return products


if __name__ == "__main__":
    main()
