"""Token-shift mixing: several blends of each token with its predecessor, in one pass.

x052 and x070 blend by fixed shares (`token_shift_mix`); x060's shares differ from token to token
and come from the difference itself (`shift_difference`, `blend`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvtune.kernels.calls import apply
from rwkvtune.kernels.dispatch import fuses_with_triton
from rwkvtune.kernels.split import token_before


def previous_token(z: Tensor, before: Tensor | None, reset: Tensor | None = None) -> Tensor:
    """Shift z by one token: P(z)_t = z_{t-1}, P(z)_0 = `before`; zero where a document starts.

    z: [B, T, C].  before: [B, C], or None for zeros.  reset: bool [B, T], or None.
    """
    shifted = torch.empty_like(z)
    shifted[:, 1:] = z[:, :-1]
    shifted[:, 0] = 0 if before is None else before.to(z.dtype)
    if reset is not None:
        shifted.masked_fill_(reset[:, :, None], 0)
    return shifted


def token_shift_mix_reference(
    z: Tensor, mix: Tensor, before: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The formula, for autograd: z + (P(z) - z) * mix[s] for each s."""
    B, T, C = z.shape
    first = z.new_zeros(B, C) if before is None else before.to(z.dtype)
    shifted = torch.cat([first[:, None], z[:, :-1]], dim=1)
    if reset is not None:
        shifted = shifted.masked_fill(reset[:, :, None], 0)
    return tuple(z + (shifted - z) * row.to(z.dtype) for row in mix)


class _TokenShiftMix(torch.autograd.Function):
    """Autograd would write one gradient of z per blend, zero-fill the slices and add them up; this
    adds once."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mix: Tensor, before: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, ...]:
        mix = mix.to(z.dtype)
        d = previous_token(z, before, reset).sub_(z)
        ctx.save_for_backward(d, mix, reset)
        ctx.has_before = before is not None
        return tuple(torch.addcmul(z, d, row) for row in mix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d, mix, reset = ctx.saved_tensors
        dz = grads[0].clone() if len(grads) == 1 else grads[0] + grads[1]  # [B,T,C]
        for g in grads[2:]:
            dz.add_(g)
        dprev = grads[0] * mix[0]
        for g, row in zip(grads[1:], mix[1:], strict=True):
            dprev.addcmul_(g, row)
        dbefore = _shift_back(dz.sub_(dprev), dprev, reset, ctx.has_before)
        dmix = torch.stack([column_sum(g * d) for g in grads])
        return dz, dmix, dbefore, None


def _shift_back(dz: Tensor, dprev: Tensor, reset: Tensor | None, has_before: bool) -> Tensor | None:
    """Add the gradient of P(z) to that of z; returns that of `before`. Uses up dprev."""
    if reset is not None:
        dprev.masked_fill_(reset[:, :, None], 0)
    dz[:, :-1].add_(dprev[:, 1:])
    return dprev[:, 0] if has_before else None


def column_sum(x: Tensor) -> Tensor:
    """Sum over all tokens, in fp32 at least: [B, T, ...] -> [...]."""
    return x.flatten(0, 1).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


def token_shift_mix(
    z: Tensor,
    mix: Tensor,
    before: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Blend each token with the one before it, once per row of `mix`.

        out_s = z + (P(z) - z) * mix[s]        P(z)_t = z_{t-1}

    z: [B, T, C], fp32 or bf16.  mix: [S, C], any float type.  before: [B, C], the token before the
    window (zeros when None).  reset: bool [B, T], True where a document starts: its first token
    sees zeros.  backend: that of the recurrence; see `fuses_with_triton`.
    Returns S tensors [B, T, C] of z's dtype.
    Source: RWKV-7 "Goose", arXiv:2503.14456, token shift.
    """
    before = token_before(z[:, -1], before)
    if fuses_with_triton(z, backend=backend) and len(mix) <= 6:
        from . import triton_gpu

        return triton_gpu.token_shift_mix(z, mix, before, reset)
    return cast("tuple[Tensor, ...]", apply(_TokenShiftMix, z, mix, before, reset))


class _ShiftDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, before: Tensor | None, reset: Tensor | None) -> Tensor:
        ctx.save_for_backward(reset)
        ctx.has_before = before is not None
        return previous_token(z, before, reset).sub_(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dd: Tensor) -> tuple[Tensor | None, ...]:
        (reset,) = ctx.saved_tensors
        dprev = dd if reset is None else dd.clone()
        dz = dd.neg()
        return dz, _shift_back(dz, dprev, reset, ctx.has_before), None


def shift_difference(
    z: Tensor, before: Tensor | None = None, reset: Tensor | None = None
) -> Tensor:
    """P(z) - z with P, z, before and reset as in `token_shift_mix`; [B, T, C] of z's dtype."""
    before = token_before(z[:, -1], before)
    return cast(Tensor, apply(_ShiftDifference, z, before, reset))


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, d: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(d, mix)
        return tuple(torch.addcmul(z, d, share) for share in mix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        d, mix = ctx.saved_tensors
        dz = grads[0].clone()
        dd = grads[0] * mix[0]
        for g, share in zip(grads[1:], mix[1:], strict=True):
            dz.add_(g)
            dd.addcmul_(g, share)
        dmix = torch.empty_like(mix)
        for g, out in zip(grads, dmix, strict=True):
            torch.mul(g, d, out=out)
        return dz, dd, dmix


def blend(z: Tensor, d: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
    """z + d * mix[s] for each s.

    z, d: [B, T, C], fp32 or bf16.  mix: [S, B, T, C] of their dtype.  Returns S tensors [B, T, C].
    Source: "Eagle and Finch", arXiv:2404.05892, data-dependent token shift.
    """
    return cast("tuple[Tensor, ...]", apply(_Blend, z, d, mix))
