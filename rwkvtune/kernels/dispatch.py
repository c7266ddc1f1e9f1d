"""Which implementation runs a kernel, and why: pure functions of what is there and what was asked.

The only file of this room that reads the environment.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from typing import NamedTuple

import torch

from ..errors import UserError

KERNEL_VARIABLE = "RWKVTUNE_KERNEL"
"""Environment variable that names the backend wherever the caller leaves it at "auto"."""

BACKENDS = {
    "chunked": "matrix form in plain PyTorch, any device, hand-written backward",
    "reference": "one token at a time, any device, for checking",
}
"""The backends of wkv5, wkv6 and wkv7 and what each is. `triton_gpu` has its place here and does
not exist yet."""

_announced: set[str] = set()


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
    triton_available: bool = False,
) -> Choice:
    """The backend that runs a kernel for this kind of input.

    kernel: "wkv5", "wkv6" or "wkv7".  device_type: "cpu", "cuda", ...
    requested: a name from BACKENDS or "auto".
    Raises UserError for a backend that this version does not have.
    """
    if requested in BACKENDS:
        return Choice(requested, "asked for by name")
    if requested == "triton_gpu":
        raise UserError(
            f"{kernel} backend 'triton_gpu' does not exist in this version of rwkvtune; "
            f"use one of {', '.join(BACKENDS)} or 'auto'."
        )
    if requested != "auto":
        raise UserError(
            f"{kernel} backend {requested!r} is unknown; use one of "
            f"{', '.join(BACKENDS)} or 'auto' "
            f"(argument backend= or environment variable {KERNEL_VARIABLE})."
        )
    if device_type == "cpu":
        return Choice("chunked", "no GPU in use")
    triton = "triton is installed, but " if triton_available else ""
    return Choice(
        "chunked", f"{triton}this version has no {device_type} kernel of its own for {kernel}"
    )


def resolve(
    kernel: str, device_type: str, dtype: torch.dtype, head_size: int, requested: str = "auto"
) -> Choice:
    """`choose` with what this process has: the environment variable and the triton package."""
    if requested == "auto":
        requested = os.environ.get(KERNEL_VARIABLE, "auto")
    return choose(kernel, device_type, dtype, head_size, requested, _triton_available())


@functools.cache
def _triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def announce(kernel: str, choice: Choice, *, is_known: bool = False) -> None:
    """Print a choice to stderr, once per process and only on rank zero.

    is_known: the caller shows it in a place of its own, so that nothing is printed now or later.
    """
    line = f"kernel {kernel}: {choice.backend} ({choice.reason})"
    if line in _announced:
        return
    _announced.add(line)
    if not is_known and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
