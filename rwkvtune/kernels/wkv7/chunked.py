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
they are allocated once per call and reused. Memory is linear in the number of tokens: the inputs,
the states between chunks and the matrices T are what is kept for the backward.

Document starts inside a chunk: tokens of different documents do not see each other (A is masked),
only the first document of a chunk sees S0, only the last one reaches Sn.

T comes from a triangular solve in fp32: powers of Aab grow when keys repeat, and an inverse by
repeated squaring then loses every digit. 1/W is safe because the decays stay above 0.545:
1/W < 1.7e4 over 16 tokens and < 2.7e8 over 32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import LOG_DECAY_SCALE

CHUNK_LEN = 16
SLAB_ROWS = 3072
"""Tokens times heads in one slab: 0.8 MB per temporary at head size 64."""


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


class _Slab(NamedTuple):
    """`chunks` chunks of `chunk_len` tokens of the batch rows `rows`, from token `start` on."""

    rows: slice
    start: int
    chunks: int
    chunk_len: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.chunk_len)

    def of(self, x: Tensor) -> Tensor:
        """The slab of x [B,T,H,N] as a view [chunks, rows, H, chunk_len, N]."""
        R, _, H, N = x[self.rows].shape
        x = x[self.rows, self.tokens].view(R, self.chunks, self.chunk_len, H, N)
        return x.permute(1, 0, 3, 2, 4)


def _cut(B: int, T: int, H: int) -> list[list[_Slab]]:
    """The slabs of a call: for each group of batch rows, its slabs in the order of time."""
    chunk_len = min(CHUNK_LEN, T)
    rows = max(1, min(B, SLAB_ROWS // (H * chunk_len)))
    chunks = max(1, SLAB_ROWS // (rows * H * chunk_len))
    groups = []
    for first in range(0, B, rows):
        batch_rows = slice(first, min(first + rows, B))
        slabs = []
        start = 0
        while T - start >= chunk_len:
            count = min(chunks, (T - start) // chunk_len)
            slabs.append(_Slab(batch_rows, start, count, chunk_len))
            start += count * chunk_len
        if start < T:
            slabs.append(_Slab(batch_rows, start, 1, T - start))
        groups.append(slabs)
    return groups


class _Scratch:
    """Named buffers that grow to the largest size asked for and are reused from slab to slab."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._device = like.device
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of this shape with undefined contents, valid until taken again."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, device=self._device, dtype=self._dtype)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


class _Triangles(NamedTuple):
    """Constant matrices for one chunk length n."""

    running_log: Tensor
    """[n+1, n]: times sigmoid(w), gives the running log-sum of the decays; row 0 is zero."""
    forward: Tensor
    """[2n, 2n]: triangles of A; -1 in the Aab block, because T needs -Aab and nothing else does."""
    backward: Tensor
    """[2n, 2n]: triangles of dA."""
    from_reads: Tensor
    """[n, 2n]: adds d_at at (later tokens) and d_rt rt (this and later tokens)."""
    from_writes: Tensor
    """[n, 2n]: subtracts d_bh bh and d_kh kh (this and later tokens)."""
    eye: Tensor


def _triangles(n: int, like: Tensor, dtype: torch.dtype) -> _Triangles:
    ones = torch.ones(n, n, device=like.device, dtype=dtype)
    strict, full = ones.tril(-1), ones.tril()
    return _Triangles(
        running_log=torch.cat([torch.zeros_like(ones[:1]), full]) * LOG_DECAY_SCALE,
        forward=torch.cat([torch.cat([-strict, strict], 1), torch.cat([full, full], 1)]),
        backward=torch.cat([torch.cat([strict, strict], 1), torch.cat([full, full], 1)]),
        from_reads=torch.cat([strict.T, full.T], 1) * LOG_DECAY_SCALE,
        from_writes=torch.cat([full.T, full.T], 1) * -LOG_DECAY_SCALE,
        eye=torch.eye(n, device=like.device, dtype=dtype),
    )


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


def _documents(slab: _Slab, reset: Tensor, dtype: torch.dtype) -> _Documents:
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


class _Operands(NamedTuple):
    """What forward and backward both need of one slab; [M, ...] with M = chunks * rows * H."""

    gate: Tensor
    """sigmoid(w) [M, n, N]"""
    decay: Tensor
    """W_0..W_n [M, n+1, N]"""
    inverse: Tensor
    """1 / W_1..W_n [M, n, N]"""
    AR: Tensor
    AR0: Tensor
    """AR as it meets S0: rows that do not see it are zero; AR itself without document starts."""
    BK: Tensor
    BKn: Tensor
    """[bL; kL], rows that do not reach Sn are zero"""
    end: Tensor
    """what S0 is multiplied by on its way to Sn, [M, 1, N]"""
    V: Tensor
    UV: Tensor
    """[U; V]; only V is filled in."""
    A: Tensor
    """tril(AR BKᵀ), with -Aab in its first block"""


def _operands(
    slab: _Slab,
    inputs: tuple[Tensor, ...],
    documents: _Documents | None,
    triangles: _Triangles,
    scratch: _Scratch,
) -> _Operands:
    r, w, k, v, a, b = (slab.of(x) for x in inputs)
    C, R, H, n, N = r.shape
    M = C * R * H
    gate = scratch.take("gate", C, R, H, n, N)
    torch.sigmoid(gate.copy_(w), out=gate)
    decay = scratch.take("decay", M, n + 1, N)
    torch.bmm(triangles.running_log.expand(M, n + 1, n), gate.view(M, n, N), out=decay)
    decay.exp_()
    inverse = scratch.take("inverse", M, n, N)
    torch.reciprocal(decay[:, 1:], out=inverse)

    W = decay.view(C, R, H, n + 1, N)
    inverse_ = inverse.view(C, R, H, n, N)
    AR = scratch.take("AR", C, R, H, 2 * n, N)
    BK = scratch.take("BK", C, R, H, 2 * n, N)
    UV = scratch.take("UV", C, R, H, 2 * n, N)
    torch.mul(a, W[..., :-1, :], out=AR[..., :n, :])
    torch.mul(r, W[..., 1:, :], out=AR[..., n:, :])
    torch.mul(b, inverse_, out=BK[..., :n, :])
    torch.mul(k, inverse_, out=BK[..., n:, :])
    UV[..., n:, :].copy_(v)

    BKn = scratch.take("BKn", C, R, H, 2 * n, N)
    torch.mul(BK, W[..., -1:, :], out=BKn)
    A = scratch.take("A", M, 2 * n, 2 * n)
    torch.bmm(AR.view(M, 2 * n, N), BK.view(M, 2 * n, N).mT, out=A)
    A.mul_(triangles.forward)
    end = decay[:, -1:]
    AR0 = AR
    if documents is not None:
        A.view(C, R, H, 2 * n, 2 * n).mul_(documents.same)
        BKn.mul_(documents.reaches_end)
        AR0 = torch.mul(AR, documents.sees_start, out=scratch.take("AR0", C, R, H, 2 * n, N))
        end = (W[..., -1:, :] * documents.unbroken).view(M, 1, N)
    return _Operands(
        gate.view(M, n, N),
        decay,
        inverse,
        AR.view(M, 2 * n, N),
        AR0.view(M, 2 * n, N),
        BK.view(M, 2 * n, N),
        BKn.view(M, 2 * n, N),
        end,
        UV.view(M, 2 * n, N)[:, n:],
        UV.view(M, 2 * n, N),
        A,
    )


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
        B, T, H, N = r.shape
        inputs = (r, w, k, v, a, b)
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(r, memory_format=torch.contiguous_format)
        final_state = r.new_empty(B, H, N, N, dtype=dtype)
        scratch = _Scratch(r, dtype)
        kept: list[Tensor] = []
        with torch.autocast(r.device.type, enabled=False):
            for slabs in _cut(B, T, H):
                rows = slabs[0].rows
                S = torch.zeros_like(final_state[rows]) if state is None else state[rows]
                for slab in slabs:
                    C, n = slab.chunks, slab.chunk_len
                    triangles = _triangles(n, r, dtype)
                    documents = None if reset is None else _documents(slab, reset, dtype)
                    x = _operands(slab, inputs, documents, triangles, scratch)
                    M = x.A.shape[0]
                    inverse = _solve(x.A[:, :n, :n], triangles.eye)
                    states = (
                        r.new_empty(C + 1, M // C, N, N, dtype=dtype)
                        if keep
                        else scratch.take("states", C + 1, M // C, N, N)
                    )
                    states[0].copy_(S.reshape(M // C, N, N))
                    Y = _advance(slab, x, inverse, states, scratch)
                    slab.of(y).copy_(Y.view(C, -1, H, n, N))
                    S = states[C].view(-1, H, N, N)
                    if keep:
                        kept += [states, inverse]
                final_state[rows].copy_(S)
        ctx.save_for_backward(*inputs, reset, *kept)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        *inputs_, reset = ctx.saved_tensors[:7]
        inputs = tuple(inputs_)
        kept = list(ctx.saved_tensors[7:])
        r = inputs[0]
        B, T, H, N = r.shape
        dtype = d_final.dtype
        gradients = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
        )
        d_state = torch.empty_like(d_final, memory_format=torch.contiguous_format)
        scratch = _Scratch(r, dtype)
        with torch.autocast(r.device.type, enabled=False):
            for slabs in reversed(_cut(B, T, H)):
                rows = slabs[0].rows
                dS = d_final[rows]
                for slab in reversed(slabs):
                    inverse, states = kept.pop(), kept.pop()
                    triangles = _triangles(slab.chunk_len, r, dtype)
                    documents = None if reset is None else _documents(slab, reset, dtype)
                    dS = _retreat(
                        slab,
                        inputs,
                        documents,
                        triangles,
                        inverse,
                        states,
                        dy,
                        dS,
                        gradients,
                        scratch,
                    )
                d_state[rows].copy_(dS)
        wanted = [
            g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)
        ]
        return (*wanted, d_state if ctx.needs_input_grad[6] else None, None)


def _solve(minus_Aab: Tensor, eye: Tensor) -> Tensor:
    """T = (I - Aab)⁻¹ [M, n, n] by forward substitution; the diagonal is taken as one, unread."""
    eye = eye.expand(minus_Aab.shape)
    T: Tensor = torch.linalg.solve_triangular(minus_Aab, eye, upper=False, unitriangular=True)
    return T


def _advance(
    slab: _Slab, x: _Operands, inverse: Tensor, states: Tensor, scratch: _Scratch
) -> Tensor:
    """Fill states[1:] and return the outputs Y [M, n, N] of a slab; states[0] is given."""
    C, n = slab.chunks, slab.chunk_len
    M, _, N = x.AR.shape
    G = M // C
    at, rt = x.AR0[:, :n], x.AR0[:, n:]
    P = torch.bmm(inverse, at, out=scratch.take("P", M, n, N))
    TAak = torch.bmm(inverse, x.A[:, :n, n:], out=scratch.take("TAak", M, n, n))
    U = torch.bmm(TAak, x.V, out=scratch.take("U", M, n, N))
    bL, kL = x.BKn[:, :n], x.BKn[:, n:]
    torch.bmm(x.V.mT, kL, out=states[1:].view(M, N, N))
    for S, S_next, P_c, U_c, bL_c, end_c in zip(
        states[:-1].unbind(),
        states[1:].unbind(),
        P.view(C, G, n, N).unbind(),
        U.view(C, G, n, N).unbind(),
        bL.unflatten(0, (C, G)).unbind(),
        x.end.unflatten(0, (C, G)).unbind(),
        strict=True,
    ):
        U_c.baddbmm_(P_c, S.mT)
        S_next.baddbmm_(U_c.mT, bL_c)
        S_next.addcmul_(S, end_c)
    Y = torch.bmm(rt, states[:-1].view(M, N, N).mT, out=scratch.take("Y", M, n, N))
    Y.baddbmm_(x.A[:, n:, :n], U)
    return Y.baddbmm_(x.A[:, n:, n:], x.V)


def _retreat(
    slab: _Slab,
    inputs: tuple[Tensor, ...],
    documents: _Documents | None,
    triangles: _Triangles,
    inverse: Tensor,
    states: Tensor,
    dy: Tensor,
    dSn: Tensor,
    gradients: tuple[Tensor, ...],
    scratch: _Scratch,
) -> Tensor:
    """Write the gradients of a slab's inputs; return the gradient of the state that entered it."""
    x = _operands(slab, inputs, documents, triangles, scratch)
    C, n = slab.chunks, slab.chunk_len
    M, _, N = x.AR.shape
    G = M // C
    R, H = dSn.shape[:2]
    at, rt = x.AR0[:, :n], x.AR0[:, n:]
    bL, kL = x.BKn[:, :n], x.BKn[:, n:]
    S0 = states[:-1].view(M, N, N)

    U = torch.bmm(x.A[:, :n, n:], x.V, out=scratch.take("Z", M, n, N))
    U.baddbmm_(at, S0.mT)
    x.UV[:, :n].copy_(torch.bmm(inverse, U, out=scratch.take("U", M, n, N)))

    ZY = scratch.take("ZY", M, 2 * n, N)
    ZY.view(C, R, H, 2 * n, N)[..., n:, :].copy_(slab.of(dy))
    dY = ZY[:, n:]
    to_Z = torch.bmm(inverse.mT, x.A[:, n:, :n].mT, out=scratch.take("to_Z", M, n, n))
    dZ = torch.bmm(to_Z, dY, out=scratch.take("Z", M, n, N))
    P = torch.bmm(inverse.mT, bL, out=scratch.take("P", M, n, N))
    d_states = scratch.take("d_states", C + 1, G, N, N)
    d_states[C].copy_(dSn.reshape(G, N, N))
    torch.bmm(dY.mT, rt, out=d_states[:-1].view(M, N, N))
    for dS, dS_next, P_c, dZ_c, at_c, end_c in zip(
        d_states[:-1].unbind()[::-1],
        d_states[1:].unbind()[::-1],
        P.view(C, G, n, N).unbind()[::-1],
        dZ.view(C, G, n, N).unbind()[::-1],
        at.unflatten(0, (C, G)).unbind()[::-1],
        x.end.unflatten(0, (C, G)).unbind()[::-1],
        strict=True,
    ):
        dZ_c.baddbmm_(P_c, dS_next.mT)
        dS.baddbmm_(dZ_c.mT, at_c)
        dS.addcmul_(dS_next, end_c)
    ZY[:, :n].copy_(dZ)
    dSn_all = d_states[1:].view(M, N, N)

    dV = torch.bmm(kL, dSn_all.mT, out=scratch.take("U", M, n, N))
    dV.baddbmm_(x.A[:, :, n:].mT, ZY)

    dA = torch.bmm(ZY, x.UV.mT, out=scratch.take("dA", M, 2 * n, 2 * n))
    dA.mul_(triangles.backward)
    dAR = torch.bmm(ZY, S0, out=scratch.take("dAR", M, 2 * n, N))
    dBK = torch.bmm(x.UV, dSn_all, out=scratch.take("dBK", M, 2 * n, N))
    dBK.mul_(x.decay[:, -1:])
    if documents is not None:
        dA.view(C, R, H, 2 * n, 2 * n).mul_(documents.same)
        dAR.view(C, R, H, 2 * n, N).mul_(documents.sees_start)
        dBK.view(C, R, H, 2 * n, N).mul_(documents.reaches_end)
    dAR.baddbmm_(dA, x.BK)
    dBK.baddbmm_(dA.mT, x.AR)

    dr, dw, dk, dv, da, db = (slab.of(g) for g in gradients)
    W = x.decay.view(C, R, H, n + 1, N)
    inverse_W = x.inverse.view(C, R, H, n, N)
    torch.mul(dAR.view(C, R, H, 2 * n, N)[..., :n, :], W[..., :-1, :], out=da)
    torch.mul(dAR.view(C, R, H, 2 * n, N)[..., n:, :], W[..., 1:, :], out=dr)
    torch.mul(dBK.view(C, R, H, 2 * n, N)[..., :n, :], inverse_W, out=db)
    torch.mul(dBK.view(C, R, H, 2 * n, N)[..., n:, :], inverse_W, out=dk)
    dv.copy_(dV.view(C, R, H, n, N))

    leaving = torch.mul(dSn_all, states[1:].view(M, N, N), out=scratch.take("SdS", M, N, N))
    d_log = scratch.take("Y", M, n, N)
    torch.bmm(triangles.from_reads.expand(M, n, 2 * n), dAR.mul_(x.AR), out=d_log)
    d_log.baddbmm_(triangles.from_writes.expand(M, n, 2 * n), dBK.mul_(x.BK))
    d_log.add_(leaving.sum(1, keepdim=True), alpha=LOG_DECAY_SCALE)
    torch.ops.aten.sigmoid_backward(d_log, x.gate, grad_input=d_log)
    dw.copy_(d_log.view(C, R, H, n, N))
    return d_states[0].view(R, H, N, N)
