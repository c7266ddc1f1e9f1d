"""The x060 recurrence in matrix form, for decays anywhere between 0 and 1, with a hand-written
backward. x052, whose decay is one for all tokens, runs on the same code.

Legend, for one head and one chunk of n tokens that enters with the state X0 [key, value]:

    d_t             decay of token t, between 0 and 1 with both ends
    R_t = r_t d_1 .. d_{t-1}     K_s = k_s d_{s+1} .. d_n     E = d_1 .. d_n
    A_ts = sum over channels of r_t k_s d_{s+1} .. d_{t-1} for s < t, of r_t u k_t for s = t
    Y = R X0 + A V               Xn = diag(E) X0 + Kᵀ V

A product of decays may be 0, so it is never divided by: each is built by multiplying. A chunk is
the top of a binary tree whose leaves are the tokens. In a node, let R_t hold the decays from the
node's first token up to t - 1, and K_s those from s + 1 to its last one:

    first half    its R stays, its K is multiplied by the second half's whole decay
    second half   its K stays, its R is multiplied by the first half's whole decay
    before that, the block of A with t in the second half and s in the first is R Kᵀ of the halves

All factors are at most 1, so nothing overflows, and what underflows was too small to count. The
whole decay of a chunk is the exponential of a sum of logarithms, not a product of rounded
decays: a decay very near 1 would lose its distance from 1, which thousands of tokens add up.

Given dY and the gradient dXn of the leaving state:

    dX0 = Rᵀ dY + diag(E) dXn    dV = Aᵀ dY + K dXn    dA = dY Vᵀ
    at the top of the tree: dR = dY X0ᵀ    dK = V dXnᵀ

and down the tree, in each node, the gradients of its halves:

    dR of the second half: the node's, times the first half's whole decay, plus dA K
    dK of the first half:  the node's, times the second half's whole decay, plus dAᵀ R

The gradient of the logarithm of a decay product is (dR R) or (dK K), summed over the tokens whose
R or K hold it. The tree sums these on its way down too, so that a leaf's decay gets exactly the
pairs of tokens on both sides of it, and no difference of large sums is taken.

A document start at token t makes R_t and the decay of token t zero at the leaf; everything else,
gradients included, follows from that.

Only the sum of the states runs chunk after chunk; all else runs for many chunks at once, in slabs
whose temporaries stay in the cache. Memory is linear in the number of tokens: kept for the backward
are the inputs and the state that enters each slab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..slabs import Slab, cut
from .reference import LARGEST_RAW_DECAY

CHUNK_LEN = 16
SLAB_ROWS_PER_THREAD = 1536
"""Tokens times heads in one slab: 0.4 MB per temporary and thread at head size 64."""
SLAB_ROWS_GPU = 131072
TINY = 2
"""Blocks of A up to this size are multiplied elementwise: a batched product costs more."""
LOG2E = math.log2(math.e)
"""Exponentials are taken to the base 2: torch's exp2 is 3 times as fast as its exp on some CPUs."""


def wkv6_chunked(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence chunk by chunk; arguments and results as `rwkvtune.kernels.wkv6.wkv6`,
    and w may be [H, N] too: one decay for all tokens (x052)."""
    result: tuple[Tensor, Tensor] = _Wkv6.apply(r, k, v, w, u, state, reset)
    return result


class _Decays:
    """The decays of a slab's chunks: of each token, of each node of the trees, of each chunk."""

    def __init__(self, shape: tuple[int, int, int, int, int], options: dict[str, Any]) -> None:
        """shape: chunks, rows, H, n, N."""
        *lead, n, N = shape
        self.log2 = torch.empty(*shape, **options)
        """Logarithms to the base 2."""
        self.end = torch.empty(*lead, N, 1, **options)
        """What multiplies the rows of the entering state."""
        self.whole = [torch.empty(*lead, n >> i, N, **options) for i in range(n.bit_length() - 1)]
        """Whole decays of the nodes with 2^i tokens, [chunks, rows, H, n >> i, N]."""
        self.halves = [x.unflatten(3, (-1, 2)).unbind(4) for x in self.whole]
        """Those of first halves and those of second ones, [chunks, rows, H, nodes, N] each."""
        self.factors = [x.view(-1, x.shape[3] // 2, 2, 1, N).movedim(2, 0) for x in self.whole]
        """What multiplies R of second halves and K of first ones in the nodes with 2^(i+1) tokens:
        [2, M, nodes, 1, N]."""

    def load(self, w: Tensor, alive: Tensor | None) -> None:
        """w: raw, in the shape of log2.  alive: [chunks, rows, 1, n, 1], 0 where a document
        starts."""
        self.log2.copy_(w).clamp_(max=LARGEST_RAW_DECAY).mul_(LOG2E).exp2_().mul_(-LOG2E)
        self.end.copy_(self.log2.sum(3, keepdim=True).exp2_().mT)
        if alive is not None:
            self.end.mul_(alive.amin(3, keepdim=True))
        for i, whole in enumerate(self.whole):
            if i > 0:
                torch.mul(*self.halves[i - 1], out=whole)
            else:
                torch.exp2(self.log2, out=whole)
                if alive is not None:
                    whole.mul_(alive)


class _Level:
    """All nodes of one size: `nodes` in each of M trees, with two halves of `half` tokens each."""

    def __init__(self, work: _Workspace, i: int) -> None:
        self.half, self.nodes = 1 << i, work.n >> (i + 1)
        self.factors = work.decays.factors[i]
        self.RK = self.halves(work.RK)
        self.block = self.block_of(work.A)

    def halves(self, x: Tensor) -> Tensor:
        """Of x [2, M, n, N], for R and for K: R's second halves and K's first ones, as a view
        [2, M, nodes, half, N]."""
        slot, chunk, token, channel = x.stride()
        steps = (slot - self.half * token, chunk, 2 * self.half * token, token, channel)
        shape = (2, x.shape[1], self.nodes, self.half, x.shape[3])
        return x.as_strided(shape, steps, x.storage_offset() + self.half * token)

    def block_of(self, A: Tensor) -> Tensor:
        """Of A [M, n, n]: rows of second halves, columns of first ones, as a view
        [M, nodes, half, half]."""
        chunk, row, column = A.stride()
        steps = (chunk, 2 * self.half * (row + column), row, column)
        shape = (A.shape[0], self.nodes, self.half, self.half)
        return A.as_strided(shape, steps, A.storage_offset() + self.half * row)

    def climb(self) -> None:
        """Fill this level's block of A with R Kᵀ, and take R and K to the nodes above."""
        R, K = self.RK
        if self.half > TINY:
            scores = torch.bmm(R.flatten(0, 1), K.flatten(0, 1).mT)
            self.block.copy_(scores.view(self.block.shape))
        else:
            for s in range(self.half):
                torch.sum(R * K[:, :, s : s + 1], -1, out=self.block[..., s])
        self.RK.mul_(self.factors)


class _RetreatLevel(_Level):
    """The same with its gradients."""

    def __init__(self, work: _Retreat, i: int) -> None:
        super().__init__(work, i)
        self.kept = torch.empty(self.RK.shape, dtype=self.RK.dtype, device=self.RK.device)
        """R and K as they entered A."""
        self.d_kept = work.scratch.view(self.RK.shape)
        self.d_block = self.block_of(work.dA)
        self.dRK = self.halves(work.dRK)
        self.mass = self.halves(work.mass)
        self.d_log = work.d_log[i].unflatten(1, (self.nodes, 2))  # [M,nodes,2,N]
        self.d_log_of_halves = self.d_log.movedim(2, 0)
        self.d_log_above = work.d_log[i + 1][:, :, None]

    def climb(self) -> None:
        self.kept.copy_(self.RK)
        super().climb()

    def descend(self) -> None:
        """Take the gradients of R and K, and of each whole decay's logarithm, to the halves."""
        torch.sum(self.mass, 3, out=self.d_log_of_halves)
        self.d_log.add_(self.d_log_above)
        (R, K), (dR, dK) = self.kept, self.d_kept
        if self.half > TINY:
            d_block = self.d_block.contiguous().flatten(0, 1)
            torch.bmm(d_block, K.flatten(0, 1), out=dR.flatten(0, 1))
            torch.bmm(d_block.mT, R.flatten(0, 1), out=dK.flatten(0, 1))
        else:
            for rows, x, result in ((self.d_block, K, dR), (self.d_block.mT, R, dK)):
                torch.mul(rows[..., :1], x[:, :, :1], out=result)
                for s in range(1, self.half):
                    result.addcmul_(rows[..., s : s + 1], x[:, :, s : s + 1])
        torch.addcmul(self.d_kept, self.dRK, self.factors, out=self.dRK)
        if self.half > 1:  # at a leaf R and K hold no decay
            self.mass.addcmul_(self.d_kept, self.kept)


class _Workspace:
    """One slab at a time: its temporaries, made once per call and slab shape, and the steps on it.

    There are M = chunks * rows * H chunks of n tokens; tensors are [M, ...]. `as5` shows one as
    [chunks, rows, H, ...], the form in which a slab of the inputs is seen.
    """

    def __init__(self, slab: Slab, like: Tensor, dtype: torch.dtype) -> None:
        H, N = like.shape[2:]
        R, C, n = slab.shape
        self.five = (C, R, H)
        self.C, self.G, self.M, self.n, self.N = C, R * H, C * R * H, n, N
        self._options: dict[str, Any] = {"device": like.device, "dtype": dtype}
        self.decays = _Decays((C, R, H, n, N), self._options)
        self.RK = self.pair()
        self.R, self.K = self.RK
        self.V, self.Y, self.bonus = (self.empty(n, N) for _ in range(3))
        self.A = self.empty(n, n).zero_()  # above the diagonal it stays so
        self.diagonal = self.A.diagonal(dim1=1, dim2=2)
        self.states = self.new_states()
        self.entering = self.states[:-1].view(self.M, N, N)
        self.ends = self.decays.end.view(C, self.G, N, 1).unbind()
        self.alive: Tensor | None = None
        self.levels: Sequence[_Level] = [_Level(self, i) for i in range(n.bit_length() - 1)]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(self.M, *shape, **self._options)

    def pair(self) -> Tensor:
        """Room for something of R and something of K."""
        return torch.empty(2, self.M, self.n, self.N, **self._options)

    def as5(self, x: Tensor) -> Tensor:
        return x.view(*self.five, *x.shape[1:])

    def new_states(self) -> Tensor:
        """Room for the states between the chunks, the entering and the leaving one included."""
        return torch.empty(self.C + 1, self.G, self.N, self.N, **self._options)

    def read(self, slab: Slab, inputs: tuple[Tensor, ...], reset: Tensor | None) -> None:
        """Take r, k, v, the decays and the diagonal of A from the inputs of a slab."""
        r, k, v, w, u = inputs
        for mine, given in ((self.R, r), (self.K, k), (self.V, v)):
            self.as5(mine).copy_(slab.of(given))
        torch.mul(self.R, self.K, out=self.bonus)
        self.as5(self.bonus).mul_(u[:, None])
        self.diagonal.copy_(self.bonus.sum(-1))
        if reset is not None:
            starts = reset[slab.rows, slab.tokens].unflatten(1, (slab.chunks, slab.chunk_len))
            self.alive = (~starts).transpose(0, 1)[:, :, None, :, None].to(self.A.dtype)
        w = slab.of(w) if w.dim() == 4 else w[:, None].expand(self.decays.log2.shape)
        self.decays.load(w, self.alive)

    def climb(self) -> None:
        """From the leaves to the top of the trees: fill A, and scale R and K."""
        if self.alive is not None:
            self.as5(self.R).mul_(self.alive)
        for level in self.levels:
            level.climb()

    def pass_state(self, S: Tensor) -> Tensor:
        """Fill the states from the entering one [rows * H, key, value]; return the leaving one."""
        self.states[0].copy_(S)
        torch.bmm(self.K.mT, self.V, out=self.states[1:].view(self.M, self.N, self.N))
        states = self.states.unbind()
        for before, after, end in zip(states, states[1:], self.ends, strict=False):
            after.addcmul_(before, end)
        return states[-1]

    def respond(self) -> Tensor:
        """Y from the states, as a slab of it is seen."""
        torch.bmm(self.R, self.entering, out=self.Y).baddbmm_(self.A, self.V)
        return self.as5(self.Y)


class _Retreat(_Workspace):
    """The backward of a slab, from the gradient of the state that it left to the one it entered."""

    def __init__(self, slab: Slab, like: Tensor, dtype: torch.dtype) -> None:
        super().__init__(slab, like, dtype)
        n, N = self.n, self.N
        self.raw, self.dRK, self.mass = self.pair(), self.pair(), self.pair()
        self.dY, self.dV, self.scratch = self.Y, self.empty(n, N), self.empty(n, N)
        self.dA = self.empty(n, n)
        self.d_states = self.new_states()
        self.d_entering = self.d_states[:-1].view(self.M, N, N)
        self.d_leaving = self.d_states[1:].view(self.M, N, N)
        self.d_log = [self.empty(n >> i, N) for i in range(n.bit_length())]
        """Gradients of the logarithms of whole decays, [M, n >> i, N] for nodes of 2^i tokens."""
        self.levels = self.retreat_levels = [
            _RetreatLevel(self, i) for i in range(n.bit_length() - 1)
        ]

    def recall(self, S: Tensor) -> None:
        """All that the forward had, from the state that it had kept."""
        self.raw.copy_(self.RK)
        self.climb()
        self.pass_state(S)

    def run(self, dy: Tensor, d_leaving: Tensor) -> Tensor:
        """The gradients at the top of the trees; returns that of the entering state.

        dy: a slab of dY.  d_leaving: [rows * H, key, value].
        """
        self.as5(self.dY).copy_(dy)
        self.d_states[-1].copy_(d_leaving)
        torch.bmm(self.R.mT, self.dY, out=self.d_entering)
        states = self.d_states.unbind()[::-1]
        for after, before, end in zip(states, states[1:], self.ends[::-1], strict=False):
            before.addcmul_(after, end)
        torch.bmm(self.K, self.d_leaving, out=self.dV).baddbmm_(self.A.mT, self.dY)
        torch.bmm(self.dY, self.entering.mT, out=self.dRK[0])
        torch.bmm(self.V, self.d_leaving.mT, out=self.dRK[1])
        torch.bmm(self.dY, self.V.mT, out=self.dA)
        # d_leaving is read for the last time here, so the product may take its place.
        top = self.d_log[-1]
        torch.sum(self.d_leaving.mul_(self.entering), 2, out=top[:, 0])
        top.mul_(self.decays.end.view(top.shape))
        return states[-1]

    def descend(self) -> None:
        """From the top of the trees to the leaves: the gradients of r, k and each decay's log."""
        torch.mul(self.dRK, self.RK, out=self.mass)
        for level in reversed(self.retreat_levels):
            level.descend()
        if self.alive is not None:
            self.as5(self.dRK[0]).mul_(self.alive)

    def add_bonus(self, u: Tensor, du: Tensor) -> None:
        """What the diagonal of A adds to the gradients of r and k; adds to du [H, N]."""
        (r, k), (dr, dk) = self.raw, self.dRK
        d_diagonal = self.dA.diagonal(dim1=1, dim2=2).contiguous()  # [M,n]
        torch.mul(self.as5(d_diagonal[..., None]), u[:, None], out=self.as5(self.bonus))
        dr.addcmul_(self.bonus, k)
        dk.addcmul_(self.bonus, r)
        torch.mul(r, k, out=self.bonus)
        du += self.as5(torch.bmm(d_diagonal[:, None], self.bonus)).sum((0, 1, 3))

    def store(self, slab: Slab, gradients: tuple[Tensor, ...]) -> None:
        """Write the gradients of the inputs; that of a decay shared by all tokens is added."""
        dr, dk, dv, dw, _ = gradients
        for gradient, found in zip((dr, dk, dv), (*self.dRK, self.dV), strict=True):
            slab.of(gradient).copy_(self.as5(found))
        # w acts through -exp(w), which is the logarithm itself.
        through_log = self.as5(self.d_log[0]).mul_(self.decays.log2)
        if dw.dim() == 4:
            slab.of(dw).copy_(through_log.mul_(1 / LOG2E))
        else:
            dw += through_log.sum((0, 1, 3)).mul_(1 / LOG2E)


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        u: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        B, _, H, N = r.shape
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        inputs = (r, k, v, w, u.to(dtype))
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(r, memory_format=torch.contiguous_format)
        final_state = r.new_empty(B, H, N, N, dtype=dtype)
        entered: list[Tensor] = []
        works: dict[tuple[int, int, int], _Workspace] = {}
        ctx.groups = cut(
            r,
            chunk_len=CHUNK_LEN,
            rows_per_thread=SLAB_ROWS_PER_THREAD,
            rows_gpu=SLAB_ROWS_GPU,
            chunks_at_least=4,
            powers_of_two=True,
        )
        with torch.autocast(r.device.type, enabled=False):
            for slabs in ctx.groups:
                rows = slabs[0].rows
                S = torch.zeros_like(final_state[rows]) if state is None else state[rows].mT
                S = S.reshape(-1, N, N)  # [value,key] -> [key,value]
                for slab in slabs:
                    if slab.shape not in works:
                        works[slab.shape] = _Workspace(slab, r, dtype)
                    work = works[slab.shape]
                    if keep:
                        entered.append(S.clone())
                    work.read(slab, inputs, reset)
                    work.climb()
                    S = work.pass_state(S)
                    slab.of(y).copy_(work.respond())
                final_state[rows].copy_(S.mT.view(final_state[rows].shape))
        ctx.save_for_backward(r, k, v, w, u, reset, *entered)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: with recomputation, each look computes them again
        (r, k, v, w, u), reset, entered = saved[:5], saved[5], list(saved[6:])
        dtype, N = d_final.dtype, r.shape[3]
        inputs = (r, k, v, w, u.to(dtype))
        each = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v)]
        shared = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (w, u)]
        if w.dim() == 4:
            shared[0] = torch.empty_like(w, memory_format=torch.contiguous_format)
        gradients = (*each, *shared)
        d_state = torch.empty_like(d_final, memory_format=torch.contiguous_format)
        works: dict[tuple[int, int, int], _Retreat] = {}
        with torch.autocast(dy.device.type, enabled=False):
            for slabs in reversed(ctx.groups):
                rows = slabs[0].rows
                dS = d_final[rows].mT.reshape(-1, N, N)
                for slab in reversed(slabs):
                    if slab.shape not in works:
                        works[slab.shape] = _Retreat(slab, r, dtype)
                    work = works[slab.shape]
                    work.read(slab, inputs, reset)
                    work.recall(entered.pop())
                    dS = work.run(slab.of(dy), dS)
                    work.descend()
                    work.add_bonus(inputs[4], shared[1])
                    work.store(slab, gradients)
                d_state[rows].copy_(dS.mT.view(d_state[rows].shape))
        needed = ctx.needs_input_grad
        wanted = [
            g.to(x.dtype) if need else None
            for g, x, need in zip(gradients, (r, k, v, w, u), needed, strict=False)
        ]
        return (*wanted, d_state if needed[5] else None, None)
