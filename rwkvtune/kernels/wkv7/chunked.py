"""The x070 recurrence in matrix form: whole chunks of tokens at once, with a hand-written backward.

Legend, for one head and one chunk of n tokens that enters with the state S0 [value, key]:

    W_t             running product of the decays inside the chunk, W_0 = 1
    at_t = a_t W_{t-1}   rt_t = r_t W_t   bh_i = b_i / W_i   kh_i = k_i / W_i
    bL_i = bh_i W_n      kL_i = kh_i W_n
    Aab = tril(at bhᵀ, -1)   Aak = tril(at khᵀ, -1)   Arb = tril(rt bhᵀ)   Ark = tril(rt khᵀ)
    T = (I - Aab)⁻¹      U = T (at S0ᵀ + Aak V), row t is S_{t-1} a_t
    Y = rt S0ᵀ + Arb U + Ark V
    Sn = S0 diag(W_n) + Uᵀ bL + Vᵀ kL

Given dY and the gradient dSn of the leaving state:

    dZ = Tᵀ (Arbᵀ dY + bL dSnᵀ)          dV = Arkᵀ dY + Aakᵀ dZ + kL dSnᵀ
    dS0 = dYᵀ rt + dZᵀ at + dSn diag(W_n)
    [d_at; d_rt] = dA [bh; kh] + [dZ; dY] S0         dA = [dZ; dY] [U; V]ᵀ under the same triangles
    [d_bh; d_kh] = dAᵀ [at; rt] + ([U; V] dSn) diag(W_n)
    gradient of the log of decay t = sum over s >= t of (d_rt rt - d_bh bh - d_kh kh)_s
        + sum over s > t of (d_at at)_s + sum over values of (dSn Sn)

Only the products with the state run chunk after chunk; all else runs for many chunks at once.
Everything is stacked in pairs, so that four small products become one: AR = [at; rt],
BK = [bh; kh], UV = [U; V], ZY = [dZ; dY], each [2n, N], and A [2n, 2n] = tril(AR BKᵀ).

The sequence is cut into slabs (some batch rows, some chunks) whose temporaries stay in the cache;
they are allocated once per call and reused. Memory is linear in the number of tokens: kept for the
backward are the inputs, T, U and the state that enters each slab; the states inside a slab are
rebuilt from U, which costs less than fetching them from memory.

Document starts inside a chunk: tokens of different documents do not see each other (A is masked),
only the first document of a chunk sees S0, only the last one reaches Sn.

T comes from a triangular solve in fp32: powers of Aab grow when keys repeat, and an inverse by
repeated squaring then loses every digit. 1/W is safe because the decays stay above 0.545:
1/W < 1.7e4 over 16 tokens and < 2.7e8 over 32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..slabs import Slab, cut
from .reference import LOG_DECAY_SCALE

CHUNK_LEN = 16
SLAB_ROWS_PER_THREAD = 1536
"""Tokens times heads in one slab: 0.4 MB per temporary and thread at head size 64, so that the
temporaries of neighbouring steps meet in the cache (half and twice as much measured slower)."""
SLAB_ROWS_GPU = 131072
"""The same on a GPU, which wants much work at once: 34 MB per temporary at head size 64."""


def wkv7_chunked(
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
    """Run the recurrence chunk by chunk; arguments and results as `rwkvtune.kernels.wkv7.wkv7`."""
    result: tuple[Tensor, Tensor] = _Wkv7.apply(r, w, k, v, a, b, state, reset)
    return result


class _Triangles:
    """Constant matrices for one chunk length n."""

    def __init__(self, n: int, like: Tensor, dtype: torch.dtype) -> None:
        full = torch.ones(n, n, device=like.device, dtype=dtype).tril()
        strict = full.tril(-1)
        # [2n, 2n], the triangles of A; -1 in the Aab block: T needs -Aab and nothing else reads it.
        self.forward = torch.cat([torch.cat([-strict, strict], 1), torch.cat([full, full], 1)])
        self.backward = self.forward.abs()  # [2n, 2n], the triangles of dA
        # [n+1, n]: times sigmoid(w) gives the running log-sum of the decays; row 0 is zero.
        self.running_log = torch.cat([torch.zeros_like(full[:1]), full]) * LOG_DECAY_SCALE
        # [n, 2n]: sums the first half over later tokens, the second over this and later ones.
        self.later = torch.cat([strict.T, full.T], 1) * LOG_DECAY_SCALE
        self.eye = torch.eye(n, device=like.device, dtype=dtype)


class _Documents(NamedTuple):
    """Which tokens of a slab's chunks belong together, as factors 0 or 1."""

    same: Tensor
    """[chunks, rows, 1, 2n, 2n]: the two tokens are in one document."""
    sees_start: Tensor
    """[chunks, rows, 1, 2n, 1]: no document starts up to this token, so it sees S0."""
    reaches_end: Tensor
    """[chunks, rows, 1, 2n, 1]: no document starts after this token, so it reaches Sn."""
    unbroken: Tensor
    """[chunks, rows, 1, 1, 1]: S0 reaches Sn."""


def _documents(slab: Slab, reset: Tensor, dtype: torch.dtype) -> _Documents:
    starts = reset[slab.rows, slab.tokens].unflatten(1, (slab.chunks, slab.chunk_len))
    document = starts.transpose(0, 1).cumsum(-1)[:, :, None]  # [chunks, rows, 1, n]
    twice = torch.cat([document, document], -1)
    last = document[..., -1:]
    return _Documents(
        same=(twice[..., :, None] == twice[..., None, :]).to(dtype),
        sees_start=(twice == 0).to(dtype)[..., None],
        reaches_end=(twice == last).to(dtype)[..., None],
        unbroken=(last == 0).to(dtype)[..., None],
    )


class _Workspace:
    """One slab at a time: its temporaries, made once per call and slab shape, and the steps on it.

    Tensors are [M, ...] with M = chunks * rows * H; names that end in 5 are views of the same
    memory as [chunks, rows, H, ...], the form in which a slab of the inputs is seen.
    """

    def __init__(self, slab: Slab, like: Tensor, dtype: torch.dtype) -> None:
        H, N = like.shape[2:]
        C, R, n = slab.chunks, slab.rows.stop - slab.rows.start, slab.chunk_len
        self.C, self.G, self.M, self.n, self.N = C, R * H, C * R * H, n, N
        self._five = (C, R, H)
        self._options: dict[str, Any] = {"device": like.device, "dtype": dtype}
        self.triangles = _Triangles(n, like, dtype)
        self.documents: _Documents | None = None

        self.gate = self.empty(n, N)
        self.decay = self.empty(n + 1, N)
        self.inverse_decay = self.empty(n, N)
        self.AR, self.BK, self.BKn, self.UV = (self.empty(2 * n, N) for _ in range(4))
        self.A = self.empty(2 * n, 2 * n)
        self.AR0 = self.AR
        self.end = self.decay[:, -1:]
        self.small = self.empty(n, n)
        self.P, self.Y = self.empty(n, N), self.empty(n, N)
        self.states = self.new_states()

        self.gate5, self.AR5, self.BK5 = map(self.as5, (self.gate, self.AR, self.BK))
        self.at5, self.rt5 = self.AR5[..., :n, :], self.AR5[..., n:, :]
        self.bh5, self.kh5 = self.BK5[..., :n, :], self.BK5[..., n:, :]
        self.before5 = self.as5(self.decay)[..., :-1, :]
        self.after5 = self.as5(self.decay)[..., 1:, :]
        self.inverse_decay5 = self.as5(self.inverse_decay)
        self.Aab, self.Aak = self.A[:, :n, :n], self.A[:, :n, n:]
        self.Arb, self.Ark = self.A[:, n:, :n], self.A[:, n:, n:]
        self.V = self.UV[:, n:]
        self.V5 = self.as5(self.UV)[..., n:, :]
        self.bL, self.kL = self.BKn[:, :n], self.BKn[:, n:]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(self.M, *shape, **self._options)

    def as5(self, x: Tensor) -> Tensor:
        return x.view(*self._five, *x.shape[1:])

    def by_chunk(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [M, ...] as one [rows * H, ...] per chunk."""
        chunks: tuple[Tensor, ...] = x.unflatten(0, (self.C, self.G)).unbind()
        return chunks

    def new_states(self) -> Tensor:
        """Room for the states between the chunks, the entering and the leaving one included."""
        return torch.empty(self.C + 1, self.G, self.N, self.N, **self._options)

    def load(self, slab: Slab, inputs: tuple[Tensor, ...], reset: Tensor | None) -> None:
        """Fill decay, AR, BK, BKn, V, A and end from the inputs of a slab."""
        r, w, k, v, a, b = (slab.of(x) for x in inputs)
        n = self.n
        torch.sigmoid(self.gate5.copy_(w), out=self.gate5)
        running_log = self.triangles.running_log.expand(self.M, n + 1, n)
        torch.bmm(running_log, self.gate, out=self.decay).exp_()
        torch.reciprocal(self.decay[:, 1:], out=self.inverse_decay)
        torch.mul(a, self.before5, out=self.at5)
        torch.mul(r, self.after5, out=self.rt5)
        torch.mul(b, self.inverse_decay5, out=self.bh5)
        torch.mul(k, self.inverse_decay5, out=self.kh5)
        self.V5.copy_(v)
        torch.mul(self.BK, self.decay[:, -1:], out=self.BKn)
        torch.bmm(self.AR, self.BK.mT, out=self.A).mul_(self.triangles.forward)
        if reset is not None:
            documents = _documents(slab, reset, self.A.dtype)
            self.documents = documents
            self.as5(self.A).mul_(documents.same)
            self.as5(self.BKn).mul_(documents.reaches_end)
            self.AR0 = (self.AR5 * documents.sees_start).view(self.AR.shape)
            self.end = (self.after5[..., -1:, :] * documents.unbroken).view(self.M, 1, self.N)

    def solve(self) -> Tensor:
        """T = (I - Aab)⁻¹ [M, n, n] by forward substitution; the diagonal is one, unread."""
        eye = self.triangles.eye.expand(self.M, self.n, self.n)
        T: Tensor = torch.linalg.solve_triangular(self.Aab, eye, upper=False, unitriangular=True)
        return T

    def advance(self, S: Tensor, T: Tensor, U: Tensor) -> Tensor:
        """Fill U [M, n, N], the states and Y from the entering state; return the leaving one."""
        at, rt = self.AR0[:, : self.n], self.AR0[:, self.n :]
        entering, leaving = self.states[:-1], self.states[1:]
        entering[0].copy_(S.reshape(entering[0].shape))
        torch.bmm(T, at, out=self.P)
        torch.bmm(torch.bmm(T, self.Aak, out=self.small), self.V, out=U)
        torch.bmm(self.V.mT, self.kL, out=leaving.view(self.M, self.N, self.N))
        for S0, Sn, P_c, U_c, bL_c, end_c in zip(
            entering.unbind(),
            leaving.unbind(),
            *map(self.by_chunk, (self.P, U, self.bL, self.end)),
            strict=True,
        ):
            U_c.baddbmm_(P_c, S0.mT)
            Sn.baddbmm_(U_c.mT, bL_c).addcmul_(S0, end_c)
        torch.bmm(rt, entering.view(self.M, self.N, self.N).mT, out=self.Y)
        self.Y.baddbmm_(self.Arb, U).baddbmm_(self.Ark, self.V)
        return leaving[-1]


class _Retreat(_Workspace):
    """The backward of a slab, from the gradient of the state that it left to the one it entered."""

    def __init__(self, slab: Slab, like: Tensor, dtype: torch.dtype) -> None:
        super().__init__(slab, like, dtype)
        n, N = self.n, self.N
        self.ZY, self.dAR, self.dBK = (self.empty(2 * n, N) for _ in range(3))
        self.dA = self.empty(2 * n, 2 * n)
        self.dZ, self.dV, self.d_log = self.empty(n, N), self.P, self.Y
        self.d_states = self.new_states()
        self.dY = self.ZY[:, n:]
        self.dY5 = self.as5(self.ZY)[..., n:, :]
        self.d_log5, self.dV5 = self.as5(self.d_log), self.as5(self.dV)
        dAR5, dBK5 = self.as5(self.dAR), self.as5(self.dBK)
        self.d_rt, self.d_bh, self.d_kh = self.dAR[:, n:], self.dBK[:, :n], self.dBK[:, n:]
        self.d_at5, self.d_rt5 = dAR5[..., :n, :], dAR5[..., n:, :]
        self.d_bh5, self.d_kh5 = dBK5[..., :n, :], dBK5[..., n:, :]
        # The same for every slab: the chunks of the sequential part, last one first.
        self._P, self._dZ = self.by_chunk(self.P)[::-1], self.by_chunk(self.dZ)[::-1]

    def recall(self, S: Tensor, U: Tensor) -> None:
        """Fill UV and the states from the entering state and U, as the forward had them."""
        self.UV[:, : self.n].copy_(U)
        entering, leaving = self.states[:-1], self.states[1:]
        entering[0].copy_(S)
        torch.bmm(self.UV.mT, self.BKn, out=leaving.view(self.M, self.N, self.N))
        for S0, Sn, end in zip(
            entering.unbind(), leaving.unbind(), self.by_chunk(self.end), strict=True
        ):
            Sn.addcmul_(S0, end)

    def run(self, T: Tensor, dy: Tensor, dSn: Tensor) -> Tensor:
        """Fill dAR, dBK, dV and end_log; return dS0 [rows * H, N, N]. dy is a slab of dY."""
        M, N, n = self.M, self.N, self.n
        at, rt = self.AR0[:, :n], self.AR0[:, n:]
        self.dY5.copy_(dy)
        torch.bmm(T.mT, self.Arb.mT, out=self.small)
        torch.bmm(self.small, self.dY, out=self.dZ)
        torch.bmm(T.mT, self.bL, out=self.P)
        d_entering, d_leaving = self.d_states[:-1], self.d_states[1:]
        d_leaving[-1].copy_(dSn.reshape(self.G, N, N))
        torch.bmm(self.dY.mT, rt, out=d_entering.view(M, N, N))
        for dS, dSn_c, P, dZ, at_c, end in zip(
            d_entering.unbind()[::-1],
            d_leaving.unbind()[::-1],
            self._P,
            self._dZ,
            self.by_chunk(at)[::-1],
            self.by_chunk(self.end)[::-1],
            strict=True,
        ):
            dZ.baddbmm_(P, dSn_c.mT)
            dS.baddbmm_(dZ.mT, at_c).addcmul_(dSn_c, end)
        self.ZY[:, :n].copy_(self.dZ)
        dSn = d_leaving.view(M, N, N)

        torch.bmm(self.kL, dSn.mT, out=self.dV).baddbmm_(self.A[:, :, n:].mT, self.ZY)
        torch.bmm(self.ZY, self.UV.mT, out=self.dA).mul_(self.triangles.backward)
        torch.bmm(self.ZY, self.states[:-1].view(M, N, N), out=self.dAR)
        torch.bmm(self.UV, dSn, out=self.dBK).mul_(self.decay[:, -1:])
        if self.documents is not None:
            self.as5(self.dA).mul_(self.documents.same)
            self.as5(self.dAR).mul_(self.documents.sees_start)
            self.as5(self.dBK).mul_(self.documents.reaches_end)
        self.dAR.baddbmm_(self.dA, self.BK)
        self.dBK.baddbmm_(self.dA.mT, self.AR)
        # d_leaving is read for the last time here, so the product may take its place.
        self.end_log = dSn.mul_(self.states[1:].view(M, N, N)).sum(1, keepdim=True)
        return self.d_states[0]

    def store(self, slab: Slab, gradients: tuple[Tensor, ...]) -> None:
        """Write the gradients of the inputs; uses up dAR."""
        dr, dw, dk, dv, da, db = (slab.of(x) for x in gradients)
        M, n = self.M, self.n
        torch.mul(self.d_at5, self.before5, out=da)
        torch.mul(self.d_rt5, self.after5, out=dr)
        torch.mul(self.d_bh5, self.inverse_decay5, out=db)
        torch.mul(self.d_kh5, self.inverse_decay5, out=dk)
        dv.copy_(self.dV5)
        d_log = self.d_log
        self.dAR.mul_(self.AR)
        self.d_rt.addcmul_(self.d_bh, self.BK[:, :n], value=-1)
        self.d_rt.addcmul_(self.d_kh, self.BK[:, n:], value=-1)
        torch.bmm(self.triangles.later.expand(M, n, 2 * n), self.dAR, out=d_log)
        d_log.add_(self.end_log, alpha=LOG_DECAY_SCALE)
        torch.ops.aten.sigmoid_backward(d_log, self.gate, grad_input=d_log)
        dw.copy_(self.d_log5)


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        B, _, H, N = r.shape
        inputs = (r, w, k, v, a, b)
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(r, memory_format=torch.contiguous_format)
        final_state = r.new_empty(B, H, N, N, dtype=dtype)
        kept: list[Tensor] = []
        workspaces: dict[tuple[int, int, int], _Workspace] = {}
        ctx.groups = cut(
            r,
            chunk_len=CHUNK_LEN,
            rows_per_thread=SLAB_ROWS_PER_THREAD,
            rows_gpu=SLAB_ROWS_GPU,
        )
        with torch.autocast(r.device.type, enabled=False):
            for slabs in ctx.groups:
                rows = slabs[0].rows
                S = torch.zeros_like(final_state[rows]) if state is None else state[rows]
                for slab in slabs:
                    if slab.shape not in workspaces:
                        workspaces[slab.shape] = _Workspace(slab, r, dtype)
                    work = workspaces[slab.shape]
                    work.load(slab, inputs, reset)
                    inverse, U = work.solve(), work.empty(slab.chunk_len, N)
                    if keep:
                        kept += (S.reshape(-1, N, N).clone(), inverse, U)
                    S = work.advance(S, inverse, U)
                    slab.of(y).copy_(work.as5(work.Y))
                final_state[rows].copy_(S.view(final_state[rows].shape))
        ctx.save_for_backward(*inputs, reset, *kept)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: with recomputation, each look computes them again
        inputs, reset, kept = saved[:6], saved[6], saved[7:]
        of_slabs = list(zip(kept[::3], kept[1::3], kept[2::3], strict=True))
        gradients = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
        )
        d_state = torch.empty_like(d_final, memory_format=torch.contiguous_format)
        workspaces: dict[tuple[int, int, int], _Retreat] = {}
        with torch.autocast(dy.device.type, enabled=False):
            for slabs in reversed(ctx.groups):
                rows = slabs[0].rows
                dS = d_final[rows]
                for slab in reversed(slabs):
                    S, inverse, U = of_slabs.pop()
                    if slab.shape not in workspaces:
                        workspaces[slab.shape] = _Retreat(slab, inputs[0], d_final.dtype)
                    work = workspaces[slab.shape]
                    work.load(slab, inputs, reset)
                    work.recall(S, U)
                    dS = work.run(inverse, slab.of(dy), dS)
                    work.store(slab, gradients)
                d_state[rows].copy_(dS.view(d_state[rows].shape))
        needed = ctx.needs_input_grad
        wanted = [g if need else None for g, need in zip(gradients, needed, strict=False)]
        return (*wanted, d_state if needed[6] else None, None)
