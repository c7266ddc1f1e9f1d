"""The recurrence of RWKV-7 (x070): one door, several implementations behind it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["wkv7"]

SHORT_LEN = 2
"""Up to this many tokens without gradients (generation) a step per token is the fastest."""


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the x070 recurrence over a sequence.

        S_t = S_{t-1} · diag(decay_t) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ
        y_t = S_t r_t            decay_t = exp(-exp(-0.5) sigmoid(w_t)), in (0.545, 1): 1/W is safe

    r, w, k, v, a, b: [B, T, H, N], any T >= 1, one dtype (fp32, bf16 or fp16; fp64 for checks);
        w raw, before the clamp; a = -kk and b = kk * gate in the terms of the model.
    state: [B, H, N, N] fp32 (fp64 with fp64 inputs), rows indexed by v, columns by k;
        zeros when None.
    reset: [B, T] bool, True where a document starts: the state is zero before that token.
    backend: "auto" or a name of `rwkvtune.kernels.dispatch.BACKENDS`.
    Returns y [B, T, H, N] in the input dtype and the final state in the dtype of the state.
    Gradients flow to all inputs, to the initial state, and back from the final state.
    Inside kernels.split.split_over the inputs are this rank's stretch of a sequence.
    Raises UserError for shapes, dtypes or devices that do not fit, or an unknown backend.
    Source: RWKV-7 "Goose", arXiv:2503.14456.
    """
    # Imported on the first call, so that importing the package does not load torch.
    import torch

    from ..arguments import check_arguments, state_dtype
    from ..dispatch import announce, resolve
    from ..split import active_group, run_split

    check_arguments("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, state, reset)
    choice = resolve("wkv7", r.device.type, r.dtype, r.shape[3], backend)
    announce("wkv7", choice)
    run = partial(_run, choice=choice.backend, reset=reset)
    group = active_group()
    if group is None:
        return run(r, w, k, v, a, b, state)

    def transfer(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The state that comes out where the identity enters and no values do."""
        B, _, H, N = r.shape
        identity = torch.eye(N, dtype=state_dtype(r), device=r.device)
        identity = identity.expand(B, H, N, N).contiguous()
        return run(r, w, k, torch.zeros_like(v), a, b, identity)[1]

    return run_split(run, transfer, (r, w, k, v, a, b), state, group)


def _run(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    *,
    choice: str,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    import torch

    from .chunked import wkv7_chunked
    from .reference import wkv7_reference
    from .stepwise import wkv7_stepwise

    if choice == "reference":
        return wkv7_reference(r, w, k, v, a, b, state, reset=reset)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (r, w, k, v, a, b, state)
    )
    if r.shape[1] <= SHORT_LEN and not needs_grad:
        return wkv7_stepwise(r, w, k, v, a, b, state, reset=reset)
    if choice in ("triton_gpu", "triton_gpu_high"):
        from .triton_gpu import wkv7_triton

        precision = "high" if choice == "triton_gpu_high" else "default"
        return wkv7_triton(r, w, k, v, a, b, state, reset=reset, precision=precision)
    assert choice == "chunked", choice
    return wkv7_chunked(r, w, k, v, a, b, state, reset=reset)
