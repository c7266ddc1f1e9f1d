"""The x060 recurrence for a token or two without gradients, as in generation: few operations, each
over the state once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import without_autocast
from .reference import LARGEST_RAW_DECAY


def wkv6_stepwise(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token; arguments and results as `rwkvtune.kernels.wkv6.wkv6`,
    and w may be [H, N] too: one decay for all tokens (x052). No gradients. The given state is not
    changed."""
    B, T, H, N = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    y = torch.empty_like(r)
    with without_autocast(r.device.type):
        decay = torch.exp(-torch.exp(w.to(dtype).clamp(max=LARGEST_RAW_DECAY)))
        decay = decay.expand(B, T, H, N).unsqueeze(-2)
        rows, keys = (x.to(dtype).unsqueeze(-2) for x in (r, k))  # [B,T,H,1,N]
        column = v.to(dtype).unsqueeze(-1)  # [B,T,H,N,1]
        own = (rows * keys * u.to(dtype)[:, None]).sum(dim=-1, keepdim=True) * column
        S = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state
        for t in range(T):
            if reset is not None:
                S = S.masked_fill(reset[:, t, None, None, None], 0.0)
            # Products and sums: twice as fast here as matrix products of one column.
            seen = (S * rows[:, t]).sum(dim=-1, keepdim=True)  # [B,H,N,1]
            y[:, t] = (seen + own[:, t]).squeeze(-1)
            S = (S * decay[:, t]).addcmul_(column[:, t], keys[:, t])
    return y, S
