"""Which implementation runs a kernel, and why: pure functions of what is there and what was asked.

The only file of this room that reads the environment.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UserError

KERNEL_VARIABLE = "RWKVTUNE_KERNEL"
"""Environment variable that names the backend wherever the caller leaves it at "auto"."""

BACKENDS = {
    "chunked": "matrix form in plain PyTorch, any device, hand-written backward",
    "reference": "one token at a time, any device, for checking",
    "triton_gpu": "matrix form on a GPU's tensor cores, 16-bit inputs with tf32 products",
    "triton_gpu_high": "the same with products as exact as fp32",
}
"""The backends of wkv5, wkv6 and wkv7 and what each is."""

TRITON_HEAD_SIZES = (32, 64, 128)

NO_TRITON = "triton is not installed, or sees no GPU"

_announced: set[tuple[str, str]] = set()


class Choice(NamedTuple):
    """A backend and the reason for it, for one printed line."""

    backend: str
    reason: str


def choose(
    kernel: str,
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    requested: str = "auto",
    triton_obstacle: str = NO_TRITON,
    precision: str = "default",
) -> Choice:
    """The backend that runs a kernel for this kind of input.

    kernel: "wkv5", "wkv6" or "wkv7".  device_type: "cpu", "cuda", ...
    requested: a name from BACKENDS or "auto".
    triton_obstacle: why triton cannot run here at all; empty where it can.
    precision: "high" asks for products as exact as fp32.
    Raises UserError for a backend that is unknown or cannot run this.
    """
    if requested not in BACKENDS and requested != "auto":
        raise UserError(
            f"{kernel} backend {requested!r} is unknown; use one of "
            f"{', '.join(BACKENDS)} or 'auto' "
            f"(argument backend= or environment variable {KERNEL_VARIABLE})."
        )
    exact = precision == "high"
    obstacle = triton_obstacle or _obstacle_to_kernels(dtype, head_size)
    if requested.startswith("triton_gpu"):
        if obstacle:
            raise UserError(f"{kernel} backend {requested!r} cannot run here: {obstacle}.")
        if exact:
            return Choice("triton_gpu_high", "asked for by name, with high precision")
        return Choice(requested, "asked for by name")
    if requested != "auto":
        return Choice(requested, "asked for by name")
    if device_type == "cpu":
        return Choice("chunked", "no GPU in use")
    if device_type != "cuda":
        return Choice("chunked", f"no kernel of its own for {device_type}")
    if obstacle:
        return Choice("chunked", obstacle)
    if exact:
        return Choice("triton_gpu_high", "GPU, high precision asked for")
    return Choice("triton_gpu", "GPU")


def _obstacle_to_kernels(dtype: torch.dtype, head_size: int) -> str:
    """Why Triton's kernels cannot take this input, or nothing."""
    if dtype == torch.float64:
        return "Triton's kernels do not take float64"
    if head_size not in TRITON_HEAD_SIZES:
        sizes = ", ".join(map(str, TRITON_HEAD_SIZES))
        return f"head size {head_size} is not one of {sizes}"
    return ""


def resolve(
    kernel: str,
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    requested: str = "auto",
    precision: str = "default",
) -> Choice:
    """`choose` with what this process has: the environment variable and the triton package."""
    if requested == "auto":
        requested = os.environ.get(KERNEL_VARIABLE, "auto")
    obstacle = _obstacle_to_triton()
    if device_type != "cuda" and not interprets_triton():
        obstacle = NO_TRITON
    return choose(kernel, device_type, dtype, head_size, requested, obstacle, precision)


def interprets_triton() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _obstacle_to_triton() -> str:
    """What triton lacks in this process, or nothing. It compiles its launcher, a page of C, when a
    kernel first runs (triton/runtime/build.py)."""
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON
    if interprets_triton():
        return ""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "triton finds no C compiler for its launcher: install gcc or clang, or set CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "triton finds no Python.h for its launcher: install python3-dev"
    return ""


def fuses_with_triton(x: torch.Tensor, head_size: int = 64, backend: str = "auto") -> bool:
    """Whether the fused pieces around the recurrence run their Triton kernels on this tensor.

    backend: what was asked for the recurrence; plain PyTorch there means plain PyTorch here. Inside
    torch.compile it is plain PyTorch too, which the compiler fuses with what is around it.
    """
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return False
    if torch.compiler.is_compiling() or _obstacle_to_triton():
        return False
    if backend == "auto":
        backend = os.environ.get(KERNEL_VARIABLE, "auto")
    return backend in ("auto", "triton_gpu", "triton_gpu_high") and head_size in TRITON_HEAD_SIZES


def announce(kernel: str, choice: Choice, *, is_known: bool = False) -> None:
    """Print a choice to stderr, once per process and only on rank zero.

    is_known: the caller shows it in a place of its own, so that nothing is printed now or later.
    """
    if (kernel, choice.backend) in _announced:
        return
    _announced.add((kernel, choice.backend))
    if not is_known and os.environ.get("RANK", "0") == "0":
        print(f"kernel {kernel}: {choice.backend} ({choice.reason})", file=sys.stderr)
