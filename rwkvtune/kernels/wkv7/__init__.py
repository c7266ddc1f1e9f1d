"""The recurrence of RWKV-7 (x070): one door, several implementations behind it."""

from __future__ import annotations

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
    backend: "auto", "chunked" or "reference".
    Returns y [B, T, H, N] in the input dtype and the final state in the dtype of the state.
    Gradients flow to all inputs, to the initial state, and back from the final state.
    Raises UserError for shapes, dtypes or devices that do not fit, or an unknown backend.
    Source: RWKV-7 "Goose", arXiv:2503.14456.
    """
    # Imported on the first call, so that importing the package does not load torch.
    import torch

    from ..dispatch import announce, resolve_wkv7
    from .chunked import wkv7_chunked
    from .reference import wkv7_reference
    from .stepwise import wkv7_stepwise

    _check({"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, state, reset)
    choice = resolve_wkv7(r.device.type, r.dtype, r.shape[3], backend)
    announce("wkv7", choice)
    if choice.backend == "reference":
        return wkv7_reference(r, w, k, v, a, b, state, reset=reset)
    assert choice.backend == "chunked", choice
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (r, w, k, v, a, b, state)
    )
    if r.shape[1] <= SHORT_LEN and not needs_grad:
        return wkv7_stepwise(r, w, k, v, a, b, state, reset=reset)
    return wkv7_chunked(r, w, k, v, a, b, state, reset=reset)


def _check(inputs: dict[str, Tensor], state: Tensor | None, reset: Tensor | None) -> None:
    """Raise UserError unless the arguments of `wkv7` fit together."""
    import torch

    from ...errors import UserError

    r = inputs["r"]
    if r.dim() != 4 or 0 in r.shape:
        raise UserError(f"wkv7: r must be [B, T, H, N] without empty sides; got {tuple(r.shape)}.")
    if r.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(
            f"wkv7: inputs must be float32, bfloat16, float16 or float64; got {r.dtype} for r."
        )
    for name, x in inputs.items():
        if x.shape != r.shape or x.dtype != r.dtype or x.device != r.device:
            raise UserError(
                f"wkv7: r, w, k, v, a, b must agree in shape, dtype and device; {name} is "
                f"{tuple(x.shape)} {x.dtype} on {x.device}, r is {tuple(r.shape)} {r.dtype} "
                f"on {r.device}."
            )
    B, T, H, N = r.shape
    if state is not None:
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        if state.shape != (B, H, N, N) or state.dtype != dtype or state.device != r.device:
            raise UserError(
                f"wkv7: state must be {(B, H, N, N)} {dtype} on {r.device} for inputs of shape "
                f"{tuple(r.shape)}; got {tuple(state.shape)} {state.dtype} on {state.device}."
            )
    if reset is not None and (
        reset.shape != (B, T) or reset.dtype != torch.bool or reset.device != r.device
    ):
        raise UserError(
            f"wkv7: reset must be {(B, T)} torch.bool on {r.device}, True where a document starts; "
            f"got {tuple(reset.shape)} {reset.dtype} on {reset.device}."
        )
