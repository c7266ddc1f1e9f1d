"""The x070 recurrence one token at a time: slow, plain, the truth that every backend must match."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_DECAY_SCALE = -math.exp(-0.5)
"""log(decay) = LOG_DECAY_SCALE * sigmoid(w): the soft clamp -softplus(-w) - 0.5 followed by
-exp(.), in one. It keeps the decay above exp(-0.6066) = 0.545."""


def wkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token; arguments and results as `rwkvtune.kernels.wkv7.wkv7`.

    Differentiable by autograd. Computes in fp32, or in fp64 when the inputs are fp64 (gradcheck).
    """
    B, T, H, N = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    with torch.autocast(r.device.type, enabled=False):
        r_, k_, v_, a_, b_ = (x.to(dtype) for x in (r, k, v, a, b))
        decay = torch.exp(LOG_DECAY_SCALE * torch.sigmoid(w.to(dtype)))
        S = r_.new_zeros(B, H, N, N) if state is None else state.to(dtype)
        outputs = []
        for t in range(T):
            if reset is not None:
                S = S.masked_fill(reset[:, t, None, None, None], 0.0)
            sa = S @ a_[:, t, :, :, None]  # [B,H,N,1]
            S = (
                S * decay[:, t, :, None, :]
                + sa * b_[:, t, :, None, :]
                + v_[:, t, :, :, None] * k_[:, t, :, None, :]
            )
            outputs.append((S @ r_[:, t, :, :, None]).squeeze(-1))  # [B,H,N]
        return torch.stack(outputs, dim=1).to(r.dtype), S
