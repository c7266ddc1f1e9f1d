"""The x070 recurrence for a token or two without gradients, as in generation: few operations, each
over the state once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import without_autocast
from .reference import LOG_DECAY_SCALE


def wkv7_stepwise(
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
    """Run the recurrence token by token; arguments and results as `rwkvtune.kernels.wkv7.wkv7`,
    without gradients. The given state is not changed."""
    B, T, H, N = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    y = torch.empty_like(r)
    with without_autocast(r.device.type):
        decay = torch.exp(LOG_DECAY_SCALE * torch.sigmoid(w.to(dtype)))
        rows = [x.to(dtype).unsqueeze(-2) for x in (decay, r, k, a, b)]  # [B,T,H,1,N]
        column = v.to(dtype).unsqueeze(-1)  # [B,T,H,N,1]
        S = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state
        for t in range(T):
            decay_, r_, k_, a_, b_ = (x[:, t] for x in rows)
            if reset is not None:
                S = S.masked_fill(reset[:, t, None, None, None], 0.0)
            # Products and sums: twice as fast here as matrix products of one column.
            sa = (S * a_).sum(dim=-1, keepdim=True)  # [B,H,N,1]
            S = (S * decay_).addcmul_(sa, b_).addcmul_(column[:, t], k_)
            y[:, t] = (S * r_).sum(dim=-1)
    return y, S
