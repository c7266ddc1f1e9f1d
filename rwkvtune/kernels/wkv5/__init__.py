"""The recurrence of RWKV-5.2 (x052): a door to the code of wkv6, which serves it as well.

x052's decay is wkv6's, one for all tokens. A form of its own, with the decays of a chunk computed
once, was tried: within 10 % of the time of this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..wkv6 import run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["wkv5"]


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the x052 recurrence over a sequence: `rwkvtune.kernels.wkv6.wkv6` with the same decay for
    all tokens.

        y_t = (S_{t-1} + v_t (u * k_t)ᵀ) r_t
        S_t = S_{t-1} · diag(decay) + v_t k_tᵀ         decay = exp(-exp(w)), from 0 to 1

    w, u: [H, N], any float dtype; w raw.  All else, results included, as wkv6 has it.
    Source: "Eagle and Finch", arXiv:2404.05892; RWKV-LM, RWKV-v5.
    """
    return run("wkv5", r, k, v, w, u, state, reset=reset, backend=backend)
