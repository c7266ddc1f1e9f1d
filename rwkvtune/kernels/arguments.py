"""What the doors of the recurrences refuse before any of their backends runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError


def state_dtype(r: Tensor) -> torch.dtype:
    """Of the states of a recurrence over such inputs."""
    return torch.float64 if r.dtype == torch.float64 else torch.float32


def check_arguments(
    kernel: str, inputs: dict[str, Tensor], state: Tensor | None, reset: Tensor | None
) -> None:
    """Raise UserError unless the tensors of a recurrence fit together.

    inputs: by name, r first, all [B, T, H, N] of one dtype on one device.  state: [B, H, N, N].
    reset: bool [B, T].
    """
    r = inputs["r"]
    if r.dim() != 4 or 0 in r.shape:
        raise UserError(
            f"{kernel}: r must be [B, T, H, N] without empty sides; got {tuple(r.shape)}."
        )
    if r.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(
            f"{kernel}: inputs must be float32, bfloat16, float16 or float64; got {r.dtype} for r."
        )
    for name, x in inputs.items():
        if x.shape != r.shape or x.dtype != r.dtype or x.device != r.device:
            raise UserError(
                f"{kernel}: {', '.join(inputs)} must agree in shape, dtype and device; {name} is "
                f"{tuple(x.shape)} {x.dtype} on {x.device}, r is {tuple(r.shape)} {r.dtype} "
                f"on {r.device}."
            )
    B, T, H, N = r.shape
    if state is not None:
        dtype = state_dtype(r)
        if state.shape != (B, H, N, N) or state.dtype != dtype or state.device != r.device:
            raise UserError(
                f"{kernel}: state must be {(B, H, N, N)} {dtype} on {r.device} for inputs of shape "
                f"{tuple(r.shape)}; got {tuple(state.shape)} {state.dtype} on {state.device}."
            )
    if reset is not None and (
        reset.shape != (B, T) or reset.dtype != torch.bool or reset.device != r.device
    ):
        raise UserError(
            f"{kernel}: reset must be {(B, T)} torch.bool on {r.device}, True where a document "
            f"starts; got {tuple(reset.shape)} {reset.dtype} on {reset.device}."
        )
