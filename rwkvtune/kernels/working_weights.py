"""Weights in the type of a matrix product: cast where they are used, or copies that are written
once per optimizer step.

A step of several micro-batches, or one that recomputes its blocks, casts each fp32 master weight
several times to the same 16-bit numbers. A parameter that `keep_copies` was called for holds its
copy from one forward to the next instead, until `write_copies` follows an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn


class _Copy:
    """The 16-bit copy of one parameter, and what the parameter was when it was written."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.version = -1

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        # torch counts what is written into a tensor in place, by load_state_dict for one, but not
        # what its fused optimizers write (2.13).
        if self.tensor is None or self.tensor.dtype != dtype or self.version != weight._version:
            # A tensor that inference_mode made could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                if self.tensor is None or self.tensor.dtype != dtype:
                    self.tensor = weight.detach().to(dtype)
                else:
                    self.tensor.copy_(weight)
            self.version = weight._version
        return self.tensor


class _UseCopy(torch.autograd.Function):
    """A copy as if the weight had just been cast to it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def keep_copies(parameters: Iterable[nn.Parameter]) -> None:
    """From now on these parameters keep what `in_type` casts them to.

    For parameters that are changed in place only: those that FSDP gathers are not.
    """
    for parameter in parameters:
        parameter.working_copy = _Copy()  # type: ignore[attr-defined]


def write_copies(parameters: Iterable[nn.Parameter]) -> None:
    """After an optimizer's step: the copies that there are, written again in one pass."""
    moved = [
        (kept, parameter)
        for parameter in parameters
        if (kept := getattr(parameter, "working_copy", None)) and kept.tensor is not None
    ]
    if not moved:
        return
    with torch.no_grad():
        torch._foreach_copy_([kept.tensor for kept, _ in moved], [p for _, p in moved])
    for kept, parameter in moved:
        kept.version = parameter._version


def in_type(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another float type, with a gradient in its own; the same bits either way."""
    kept = getattr(weight, "working_copy", None)
    if weight.dtype == dtype or kept is None:
        return weight.to(dtype)
    return cast(Tensor, _UseCopy.apply(weight, kept.of(weight, dtype)))
