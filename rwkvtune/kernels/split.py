"""One sequence over several ranks, each with a stretch of its tokens: context parallelism.

A recurrence does to the state X [value, key] that enters a stretch what one affine map does:
X_out = X_in M + H. Each rank finds M and H of its own stretch, all ranks exchange them, and a short
loop over the ranks before gives each the state that enters its stretch. Backward the same in
reverse: the gradient that leaves a stretch is D + dX_out Mᵀ, with D from its own outputs alone. A
token shift needs one token of the rank before.

Every rank runs the same operations in the same order, the first and the last ones too, so that
those of one rank always meet those of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Recurrence = Callable[..., tuple[Tensor, Tensor]]
"""(*inputs, state) -> outputs, final state."""

_active: dist.ProcessGroup | None = None


@contextmanager
def split_over(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Inside, the recurrences and token shifts take what they are given for this rank's stretch of
    sequences that the group shares, in the order of its ranks; None = whole sequences.

    Holds for the backward pass too where blocks are recomputed in it. States that the doors return
    are those at the end of this rank's stretch.
    """
    global _active
    before, _active = _active, group
    try:
        yield
    finally:
        _active = before


def active_group() -> dist.ProcessGroup | None:
    return _active


def token_before(last: Tensor, first: Tensor | None) -> Tensor | None:
    """[B, C]: the token before this rank's stretch; gradients flow to the rank that has it.

    last: [B, C], the last token of this rank's stretch.  first: the one before the whole sequence,
    None for zeros; without a group it is what comes back.
    """
    if _active is None:
        return first
    before: Tensor = _TokenBefore.apply(last, first, _active)
    return before


class _TokenBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: Tensor, first: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.has_first = group, first is not None
        before = torch.zeros_like(last) if first is None else first.to(last.dtype).contiguous()
        return _shifted(last, before.clone(), group, towards=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor) -> tuple[Tensor | None, ...]:
        dlast = _shifted(dbefore, torch.zeros_like(dbefore), ctx.group, towards=-1)
        is_first = dist.get_rank(ctx.group) == 0
        dfirst = dbefore if is_first else torch.zeros_like(dbefore)
        return dlast, dfirst if ctx.has_first else None, None


def _shifted(mine: Tensor, received: Tensor, group: dist.ProcessGroup, towards: int) -> Tensor:
    """Send `mine` one rank up (towards 1) or down (-1) and fill `received` from the other side; at
    the end where nobody sends it stays as it is."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine, received = mine.contiguous(), received.contiguous()
    to, source = rank + towards, rank - towards
    operations = []
    if 0 <= to < size:
        peer = dist.get_global_rank(group, to)
        operations.append(dist.P2POp(dist.isend, mine, peer, group))
    if 0 <= source < size:
        peer = dist.get_global_rank(group, source)
        operations.append(dist.P2POp(dist.irecv, received, peer, group))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    return received


def run_split(
    run: Recurrence,
    transfer: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    state: Tensor | None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """run(*inputs, state) over a sequence of which each rank of the group has a stretch.

    transfer: (*inputs) -> M of the stretch, [B, H, N, N], or [B, H, 1, N] for a diagonal one.
    state: what enters the first rank's stretch, None for zeros; the same on all ranks.
    """
    y, final = _RunSplit.apply(run, transfer, group, state, *inputs)
    return y, final


class _RunSplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Recurrence,
        transfer: Callable[..., Tensor],
        group: dist.ProcessGroup,
        state: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad)
        M = transfer(*inputs)
        _, H = run(*inputs, None)
        Ms, Hs = _gathered(M, group), _gathered(H, group)
        X = torch.zeros_like(H) if state is None else state
        for before in range(dist.get_rank(group)):
            X = _through(X, Ms[before]) + Hs[before]
        ctx.group, ctx.M, ctx.has_state = group, M, state is not None
        if not keep:
            return run(*inputs, X)
        # The recurrence's own graph, which backward goes through twice.
        ctx.inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
        ctx.entering = X.detach().requires_grad_()
        with torch.enable_grad():
            ctx.outputs = run(*ctx.inputs, ctx.entering)
        y, final = ctx.outputs
        return y.detach(), final.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        group, outputs, entering = ctx.group, ctx.outputs, ctx.entering
        (own,) = torch.autograd.grad(outputs, entering, (dy, dfinal), retain_graph=True)
        Ds, Ms = _gathered(own, group), _gathered(ctx.M, group)
        arriving = torch.zeros_like(own)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        for after in range(size - 1, rank, -1):
            arriving = Ds[after] + _back_through(arriving, Ms[after])
        wanted = [x for x in ctx.inputs if x.requires_grad]
        found = torch.autograd.grad(outputs, (entering, *wanted), (dy, dfinal + arriving))
        gradients = iter(found[1:])
        of_inputs = [next(gradients) if x.requires_grad else None for x in ctx.inputs]
        of_state = None
        if ctx.has_state:
            of_state = found[0] if rank == 0 else torch.zeros_like(found[0])
        ctx.inputs = ctx.outputs = ctx.entering = None
        return None, None, None, of_state, *of_inputs


def _through(X: Tensor, M: Tensor) -> Tensor:
    return X * M if M.shape[-2] == 1 else X @ M


def _back_through(dX: Tensor, M: Tensor) -> Tensor:
    return dX * M if M.shape[-2] == 1 else dX @ M.mT


def _gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def diagonal_transfer(w: Tensor, reset: Tensor | None) -> Tensor:
    """M [B, H, 1, N] of x060's recurrence: the product of its decays exp(-exp(w)), fp32; zero where
    a document starts on the way.

    w: [B, T, H, N].  reset: [B, T] bool or None.
    """
    M = torch.exp(-torch.exp(w.float()).sum(1))[:, :, None, :]  # [B,T,H,N] -> [B,H,1,N]
    return M if reset is None else M.masked_fill(reset.any(1)[:, None, None, None], 0.0)
