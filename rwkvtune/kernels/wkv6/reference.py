"""The x060 recurrence one token at a time: slow, plain, the truth that every backend must match."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_RAW_DECAY = 9.0
"""Above it w counts as this: exp(-exp(9)) is 0 in every float type, and so is its gradient, but
exp(w) itself must stay finite, because 0 times infinity is not 0."""


def wkv6_reference(
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
    and w may be [H, N] too: one decay for all tokens (x052).

    Differentiable by autograd. Computes in fp32, or in fp64 when the inputs are fp64 (gradcheck).
    """
    B, T, H, N = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    with torch.autocast(r.device.type, enabled=False):
        r_, k_, v_, u_ = (x.to(dtype) for x in (r, k, v, u))
        decay = torch.exp(-torch.exp(w.to(dtype).clamp(max=LARGEST_RAW_DECAY))).expand(B, T, H, N)
        S = r_.new_zeros(B, H, N, N) if state is None else state.to(dtype)
        outputs = []
        for t in range(T):
            if reset is not None:
                S = S.masked_fill(reset[:, t, None, None, None], 0.0)
            vk = v_[:, t, :, :, None] * k_[:, t, :, None, :]  # [B,H,N,N], value x key
            outputs.append(((S + u_[:, None, :] * vk) @ r_[:, t, :, :, None]).squeeze(-1))
            S = S * decay[:, t, :, None, :] + vk
        return torch.stack(outputs, dim=1).to(r.dtype), S
