"""Head, cross entropy and L2Wrap in one pass that never holds all logits."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvtune.kernels.dispatch import fuses_with_triton
from rwkvtune.kernels.working_weights import in_type

L2WRAP = 1e-4
"""Upstream's pull of each position's largest logit towards zero."""

LOGITS_IN_MEMORY = 2**25
"""Logits that exist at once: 64 MB in bf16. On a CPU more saves nothing, fewer makes the matrix
products thin."""
LOGITS_ON_GPU = 2**27
"""The same on a GPU: 256 MB. Each chunk adds to a gradient of vocabulary times width in fp32, which
beside the products of only 512 tokens would take half their time."""
SOFTMAX_BLOCK = 2**19
"""Logits whose softmax is taken at once: 2 MB in fp32, so that its passes stay in a core's
cache."""


def head_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    l2wrap: float = L2WRAP,
) -> Tensor:
    """The formula, for autograd; its value contains no L2Wrap, its gradient does."""
    logits = (hidden @ weight.to(hidden.dtype).T).flatten(0, -2)  # [B,T,V] -> [BT,V]
    targets = targets.flatten()
    loss = F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="sum")
    largest = logits.float().max(dim=-1).values[targets != ignore_index]
    wrap = 0.5 * l2wrap * largest.square().sum()
    return loss + (wrap - wrap.detach())


def rows_at_once(vocab_size: int, device_type: str) -> int:
    """Positions whose logits exist at once where nobody asked for another number."""
    logits = LOGITS_ON_GPU if device_type == "cuda" else LOGITS_IN_MEMORY
    return max(1, logits // vocab_size)


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward pass, while each block of logits is at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
        ignore_index: int, l2wrap: float, chunk_rows: int, backend: str,
    ) -> Tensor:  # fmt: skip
        C, (V, _) = hidden.shape[-1], weight.shape
        x, y = hidden.reshape(-1, C), targets.reshape(-1)
        w = in_type(weight, x.dtype)
        need_dx, need_dw = ctx.needs_input_grad[:2]
        counted = y != ignore_index
        gold = torch.where(counted, y, 0)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if need_dx else None
        dw = None
        rows = chunk_rows or rows_at_once(V, x.device.type)
        block = max(1, SOFTMAX_BLOCK // V) if x.device.type == "cpu" else rows
        for begin in range(0, x.shape[0], rows):
            part = slice(begin, begin + rows)
            logits = x[part] @ w.T  # [rows,V]
            for first in range(0, logits.shape[0], block):
                some = logits[first : first + block]
                here = slice(begin + first, begin + first + some.shape[0])
                loss += _softmax_into_gradient(some, gold[here], counted[here], l2wrap, backend)
            if dx is not None:
                torch.mm(logits, w, out=dx[part])
            if need_dw:
                dw = _accumulate(dw, logits, x[part])
        ctx.save_for_backward(None if dx is None else dx.view_as(hidden), dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        if dx is not None:
            dx = dx * grad.to(dx.dtype)
        if dw is not None:
            dw = (dw * grad).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None, None


def _softmax_into_gradient(
    logits: Tensor, gold: Tensor, counted: Tensor, l2wrap: float, backend: str
) -> Tensor:
    """Overwrite logits [rows, V] with d(sum of losses)/d(logits), L2Wrap included; return the sum
    in fp32.

    Rows that are not counted get a zero gradient. The largest logit is the first one where several
    are equal.
    """
    if fuses_with_triton(logits, backend=backend):
        from . import triton_gpu

        return triton_gpu.softmax_into_gradient(logits, gold, counted, l2wrap)
    z = logits.float()
    largest, where = z.max(dim=-1, keepdim=True)
    picked = z.gather(1, gold[:, None])
    p = z.sub_(largest).exp_()  # in place: for fp32 logits this is their own memory
    total = p.sum(dim=-1, keepdim=True)
    losses = (total.log() + largest - picked) * counted[:, None]
    p.mul_(counted[:, None] / total)
    p.scatter_add_(1, gold[:, None], -counted[:, None].to(p.dtype))
    p.scatter_add_(1, where, l2wrap * largest * counted[:, None])
    if p.data_ptr() != logits.data_ptr():
        logits.copy_(p)
    return losses.sum()


def _accumulate(total: Tensor | None, dlogits: Tensor, x: Tensor) -> Tensor:
    """total += dlogitsᵀ x in fp32; [rows,V], [rows,C] -> [V,C]."""
    if total is None:
        return (dlogits.T @ x).float()
    if x.dtype == torch.float32:
        return total.addmm_(dlogits.T, x)
    return total.add_(dlogits.T @ x)


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    l2wrap: float = L2WRAP,
    chunk_rows: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sum over positions of -log softmax(hidden weightᵀ)[target], with L2Wrap in its gradient only.

    hidden: [..., C], fp32 or bf16.  weight: [V, C], used in hidden's type.  targets: int64 [...];
    positions with `ignore_index` count for nothing.
    l2wrap: adds l2wrap * max_logit to the gradient of each position's largest logit (0 = off); with
    the mean taken over positions this is upstream's max_logit * 1e-4 / (B*T).
    chunk_rows: positions whose logits exist at once (upstream's head_chunk); 0 = see
    `rows_at_once`.  backend: that of the recurrence; see `fuses_with_triton`.
    Returns the sum, fp32 scalar. Softmax and sums are fp32 whatever the input.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        loss = _HeadCrossEntropy.apply(
            hidden, weight, targets, ignore_index, l2wrap, chunk_rows, backend
        )
        return cast(Tensor, loss)
