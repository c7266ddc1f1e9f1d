"""The recurrence of RWKV-6 (x060): one door, several implementations behind it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["wkv6"]

SHORT_LEN = 2
"""Up to this many tokens without gradients (generation) a step per token is the fastest."""


def wkv6(
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
    """Run the x060 recurrence over a sequence.

        y_t = (S_{t-1} + v_t (u * k_t)ᵀ) r_t
        S_t = S_{t-1} · diag(decay_t) + v_t k_tᵀ       decay_t = exp(-exp(w_t)), from 0 to 1

    r, k, v: [B, T, H, N], any T >= 1, one dtype (fp32, bf16 or fp16; fp64 for checks).
    w: [B, T, H, N], any float dtype; raw.  u: [H, N], any float dtype: what a token's own key and
        value count for.
    state: [B, H, N, N] fp32 (fp64 with fp64 inputs), rows indexed by v, columns by k;
        zeros when None.
    reset: [B, T] bool, True where a document starts: the state is zero before that token.
    backend: "auto" or a name of `rwkvtune.kernels.dispatch.BACKENDS`.
    Returns y [B, T, H, N] in the input dtype and the final state in the dtype of the state.
    Gradients flow to all inputs, to the initial state, and back from the final state. Decays of 0
    and 1 are as good as any other.
    Raises UserError for shapes, dtypes or devices that do not fit, or an unknown backend.
    Source: "Eagle and Finch", arXiv:2404.05892.
    """
    return run("wkv6", r, k, v, w, u, state, reset=reset, backend=backend)


def run(
    kernel: str,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    *,
    reset: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What is behind the doors of wkv6 and, with w [H, N], of wkv5."""
    # Imported on the first call, so that importing the package does not load torch.
    from ...errors import UserError
    from ..arguments import check_arguments
    from ..dispatch import announce, resolve
    from ..split import active_group, diagonal_transfer, run_split

    check_arguments(kernel, {"r": r, "k": k, "v": v}, state, reset)
    of_channels = r.shape[2:]
    for name, x, shape in (
        ("w", w, of_channels if kernel == "wkv5" else r.shape),
        ("u", u, of_channels),
    ):
        if x.shape != shape or not x.is_floating_point() or x.device != r.device:
            raise UserError(
                f"{kernel}: {name} must be {tuple(shape)} of a float dtype on {r.device} for r of "
                f"shape {tuple(r.shape)}; got {tuple(x.shape)} {x.dtype} on {x.device}."
            )
    choice = resolve(kernel, r.device.type, r.dtype, r.shape[3], backend)
    announce(kernel, choice)
    alone = partial(_run, choice=choice.backend, reset=reset)
    group = active_group()
    if group is None:
        return alone(r, k, v, w, u, state)

    def transfer(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return diagonal_transfer(w.expand(r.shape), reset)

    return run_split(alone, transfer, (r, k, v, w, u), state, group)


def _run(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    *,
    choice: str,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    import torch

    from .chunked import wkv6_chunked
    from .reference import wkv6_reference
    from .stepwise import wkv6_stepwise

    if choice == "reference":
        return wkv6_reference(r, k, v, w, u, state, reset=reset)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (r, k, v, w, u, state)
    )
    if r.shape[1] <= SHORT_LEN and not needs_grad:
        return wkv6_stepwise(r, k, v, w, u, state, reset=reset)
    if choice in ("triton_gpu", "triton_gpu_high"):
        from .triton_gpu import wkv6_triton

        precision = "high" if choice == "triton_gpu_high" else "default"
        return wkv6_triton(r, k, v, w, u, state, reset=reset, precision=precision)
    assert choice == "chunked", choice
    return wkv6_chunked(r, k, v, w, u, state, reset=reset)
