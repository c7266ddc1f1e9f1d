"""The x070 recurrence on a GPU: four Triton kernels around the matrix form of `chunked`.

Legend as in `chunked`, with the state transposed, X = Sᵀ [key, value], so that every product is
one of tensor cores in its natural order. For one head and one chunk of n tokens:

    _invert          Tinv = (I - Aab)⁻¹                                all chunks at once
    _forward         U = Tinv (at X0 + Aak V)
                     Y = rt X0 + Arb U + Ark V
                     Xn = diag(W_n) X0 + bLᵀ U + kLᵀ V                 chunk after chunk
    _state_gradient  dZ = Tinvᵀ (Arbᵀ dY + bL dXn)
                     dX0 = rtᵀ dY + atᵀ dZ + diag(W_n) dXn             chunk after chunk, in reverse
    _backward        everything else, from X0 and dXn of each chunk    all chunks at once

The two sequential kernels run one program per head and block of values, since the columns of X, U
and Y do not see each other. Where batch times heads is too small to fill the device, the sequence
is cut into segments that run side by side: Xn = Mᵀ X0 + H holds for a segment as it does for a
chunk, M and H come from two runs of `_forward` (from the identity without values, and from zero),
and a short loop over the segments gives each its entering state. The backward does the same with
Mᵀ in reverse.

Inputs are read as they are, everything is computed and accumulated in fp32, and `precision` says
what the operands of a matrix product are rounded to. Decays are exponentials of running sums;
1/W_i stays below 7e16 over 64 tokens because a decay is above 0.545. The inverse is a forward
substitution in fp32, row after row.

Kept for the backward: the inputs, Tinv in fp32 and the state that enters each chunk. With 16-bit
inputs and default precision those states are bf16, as half of the backward's memory traffic is
theirs; the recurrence itself always carries fp32.

`python -m benchmarks.ptx` compiles these kernels for GPUs that need not be there and prints the
registers they take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import LOG_DECAY_SCALE

CHUNK_LEN = 16
"""Tokens per chunk. With 32 the kernels keep half the states and compute more; compiled for sm_90
their tiles no longer fit into registers."""
VALUES_PER_PROGRAM = 32
"""Columns of the state that one program of the sequential kernels carries; 64 spill registers."""
PROGRAMS_PER_PROCESSOR = 2
"""Below so many sequential programs for each multiprocessor, the sequence is cut into segments."""
SEGMENT_CHUNKS = 16
"""A segment has at least so many chunks: its two extra runs cost as much as its own one."""

SCALE = tl.constexpr(LOG_DECAY_SCALE)


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _place(bh, chunk, T, H, N: tl.constexpr, n: tl.constexpr):
    """Where a chunk's first token is in a [B,T,H,N] tensor, the offsets [n, 1] of its tokens from
    there, and which of them exist. Only the first number needs 64 bits: one register pair for a
    tile instead of one for each of its elements."""
    row = tl.arange(0, n)
    origin = ((bh // H).to(tl.int64) * T + chunk * n) * H * N + (bh % H) * N
    return origin, (row * (H * N))[:, None], (chunk * n + row < T)[:, None]


@triton.jit
def _read(x, origin, tile, exists):
    return tl.load(x + origin + tile, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _write(x, origin, tile, exists, value):
    tl.store(x + origin + tile, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def _decays(w, origin, tile, exists):
    """sigmoid(w), the logarithm of each decay and its running sum, [n, N]; tokens that do not
    exist decay nothing."""
    gate = tl.sigmoid(_read(w, origin, tile, exists))
    log = tl.where(exists, gate * SCALE, 0.0)
    return gate, log, tl.cumsum(log, 0)


@triton.jit
def _documents(reset, bh, chunk, T, H, n: tl.constexpr, HAS_RESET: tl.constexpr):
    """Which document of the chunk each token is in, 0 being the one that began before it."""
    document = tl.zeros([n], tl.int32)
    if HAS_RESET:
        token = chunk * n + tl.arange(0, n)
        starts = tl.load(reset + (bh // H).to(tl.int64) * T + token, mask=token < T, other=0)
        document = tl.cumsum(starts.to(tl.int32), 0)
    return document


@triton.jit
def _triangle(product, document, n: tl.constexpr, STRICT: tl.constexpr):
    """product [n, n] where the token of the row may see that of the column, else 0."""
    token = tl.arange(0, n)
    if STRICT:
        seen = token[:, None] > token[None, :]
    else:
        seen = token[:, None] >= token[None, :]
    return tl.where(seen & (document[:, None] == document[None, :]), product, 0.0)


@triton.jit
def _invert(w, a, b, inverse, reset, T, H, chunks,
            N: tl.constexpr, n: tl.constexpr,
            HAS_RESET: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1)
    origin, rows, exists = _place(bh, chunk, T, H, N, n)
    columns = tl.arange(0, N)[None, :]
    _, log, total = _decays(w, origin, rows + columns, exists)
    at = _read(a, origin, rows + columns, exists) * tl.exp(total - log)
    bh_ = _read(b, origin, rows + columns, exists) * tl.exp(-total)
    document = _documents(reset, bh, chunk, T, H, n, HAS_RESET)
    A = _triangle(_dot(at, tl.trans(bh_), PRECISION), document, n, True)
    token = tl.arange(0, n)
    solved = tl.where(token[:, None] == token[None, :], 1.0, 0.0)
    for i in range(1, n):
        here = token[:, None] == i
        row = tl.sum(tl.where(here, A, 0.0), 0)
        # Column of A's row i times the rows that are solved already; the rest of the row is 0.
        above = tl.sum(row[:, None] * solved, 0)
        solved += tl.where(here, above[None, :], 0.0)
    square = token[:, None] * n + token[None, :]
    tl.store(inverse + (bh.to(tl.int64) * chunks + chunk) * n * n + square, solved)


@triton.jit
def _forward(r, w, k, v, a, b, inverse, reset, state, y, states, final,
             T, H, chunks, segments, chunks_per_segment,
             N: tl.constexpr, n: tl.constexpr, VALUES: tl.constexpr,
             HAS_RESET: tl.constexpr, HAS_STATE: tl.constexpr, IDENTITY: tl.constexpr,
             WRITE_Y: tl.constexpr, WRITE_STATES: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """IDENTITY: enter with X = I and no values, so that X becomes the segment's M."""
    part, bh, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tl.arange(0, N)[None, :]
    values = part * VALUES + tl.arange(0, VALUES)[None, :]
    key = tl.arange(0, N)[:, None]
    square = values * N + key  # X [key, value] in memory as S [value, key]
    start = (bh.to(tl.int64) * segments + segment) * N * N
    if IDENTITY:
        X = tl.where(key == values, 1.0, 0.0)
    elif HAS_STATE:
        X = tl.load(state + start + square)
    else:
        X = tl.zeros([N, VALUES], tl.float32)
    token = tl.arange(0, n)
    first = segment * chunks_per_segment
    for chunk in range(first, tl.minimum(first + chunks_per_segment, chunks)):
        at_chunk = bh.to(tl.int64) * chunks + chunk
        if WRITE_STATES:
            tl.store(states + at_chunk * N * N + square, X.to(states.dtype.element_ty))
        origin, rows, exists = _place(bh, chunk, T, H, N, n)
        _, log, total = _decays(w, origin, rows + columns, exists)
        document = _documents(reset, bh, chunk, T, H, n, HAS_RESET)
        last = tl.max(document, 0)
        end = tl.sum(log, 0)
        at = _read(a, origin, rows + columns, exists) * tl.exp(total - log)
        b_ = _read(b, origin, rows + columns, exists)
        k_ = _read(k, origin, rows + columns, exists)
        kh = k_ * tl.exp(-total)
        to_end = tl.exp(end[None, :] - total)
        Tinv = tl.load(inverse + at_chunk * n * n + token[:, None] * n + token[None, :])
        sees_start = tl.where(document == 0, 1.0, 0.0)[:, None]
        reaches_end = tl.where(document == last, 1.0, 0.0)[:, None]

        Z = _dot(at, X, PRECISION) * sees_start
        if IDENTITY:
            V = tl.zeros([n, VALUES], tl.float32)
        else:
            V = _read(v, origin, rows + values, exists)
            A_ak = _triangle(_dot(at, tl.trans(kh), PRECISION), document, n, True)
            Z += _dot(A_ak, V, PRECISION)
        U = _dot(Tinv, Z, PRECISION)
        if WRITE_Y:
            rt = _read(r, origin, rows + columns, exists) * tl.exp(total)
            bh_ = b_ * tl.exp(-total)
            A_rb = _triangle(_dot(rt, tl.trans(bh_), PRECISION), document, n, False)
            A_rk = _triangle(_dot(rt, tl.trans(kh), PRECISION), document, n, False)
            Y = _dot(rt, X, PRECISION) * sees_start
            Y += _dot(A_rb, U, PRECISION) + _dot(A_rk, V, PRECISION)
            _write(y, origin, rows + values, exists, Y)
        X *= tl.where(last == 0, tl.exp(end), 0.0)[:, None]
        X += _dot(tl.trans(b_ * to_end * reaches_end), U, PRECISION)
        if not IDENTITY:
            X += _dot(tl.trans(k_ * to_end * reaches_end), V, PRECISION)
    tl.store(final + start + square, X)


@triton.jit
def _state_gradient(r, w, a, b, inverse, reset, dy, d_final, d_states, d_state,
                    T, H, chunks, segments, chunks_per_segment,
                    N: tl.constexpr, n: tl.constexpr, VALUES: tl.constexpr,
                    HAS_RESET: tl.constexpr, HAS_FINAL: tl.constexpr,
                    WRITE_STATES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    part, bh, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tl.arange(0, N)[None, :]
    values = part * VALUES + tl.arange(0, VALUES)[None, :]
    square = values * N + tl.arange(0, N)[:, None]
    start = (bh.to(tl.int64) * segments + segment) * N * N
    if HAS_FINAL:
        dX = tl.load(d_final + start + square)
    else:
        dX = tl.zeros([N, VALUES], tl.float32)
    token = tl.arange(0, n)
    first = segment * chunks_per_segment
    stop = tl.minimum(first + chunks_per_segment, chunks)
    for step in range(0, stop - first):
        chunk = stop - 1 - step
        at_chunk = bh.to(tl.int64) * chunks + chunk
        if WRITE_STATES:
            tl.store(d_states + at_chunk * N * N + square, dX.to(d_states.dtype.element_ty))
        origin, rows, exists = _place(bh, chunk, T, H, N, n)
        _, log, total = _decays(w, origin, rows + columns, exists)
        document = _documents(reset, bh, chunk, T, H, n, HAS_RESET)
        last = tl.max(document, 0)
        end = tl.sum(log, 0)
        at = _read(a, origin, rows + columns, exists) * tl.exp(total - log)
        rt = _read(r, origin, rows + columns, exists) * tl.exp(total)
        b_ = _read(b, origin, rows + columns, exists)
        dY = _read(dy, origin, rows + values, exists)
        Tinv = tl.load(inverse + at_chunk * n * n + token[:, None] * n + token[None, :])
        sees_start = tl.where(document == 0, 1.0, 0.0)[:, None]
        reaches_end = tl.where(document == last, 1.0, 0.0)[:, None]

        A_rb = _dot(rt, tl.trans(b_ * tl.exp(-total)), PRECISION)
        A_rb = _triangle(A_rb, document, n, False)
        dU = _dot(tl.trans(A_rb), dY, PRECISION)
        dU += _dot(b_ * tl.exp(end[None, :] - total) * reaches_end, dX, PRECISION)
        dZ = _dot(tl.trans(Tinv), dU, PRECISION)
        dX *= tl.where(last == 0, tl.exp(end), 0.0)[:, None]
        dX += _dot(tl.trans(rt * sees_start), dY, PRECISION)
        dX += _dot(tl.trans(at * sees_start), dZ, PRECISION)
    tl.store(d_state + start + square, dX)


@triton.jit
def _backward(r, w, k, v, a, b, inverse, reset, dy, states, d_states,
              dr, dw, dk, dv, da, db, T, H, chunks,
              N: tl.constexpr, n: tl.constexpr,
              HAS_RESET: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1)
    at_chunk = bh.to(tl.int64) * chunks + chunk
    columns = tl.arange(0, N)[None, :]
    square = columns * N + tl.arange(0, N)[:, None]
    token = tl.arange(0, n)
    origin, rows, exists = _place(bh, chunk, T, H, N, n)
    document = _documents(reset, bh, chunk, T, H, n, HAS_RESET)
    last = tl.max(document, 0)
    sees_start = tl.where(document == 0, 1.0, 0.0)[:, None]
    reaches_end = tl.where(document == last, 1.0, 0.0)[:, None]

    gate, log, total = _decays(w, origin, rows + columns, exists)
    end = tl.sum(log, 0)
    before, after, undo = tl.exp(total - log), tl.exp(total), tl.exp(-total)
    to_end = tl.exp(end[None, :] - total) * reaches_end
    at = _read(a, origin, rows + columns, exists) * before
    rt = _read(r, origin, rows + columns, exists) * after
    b_ = _read(b, origin, rows + columns, exists)
    k_ = _read(k, origin, rows + columns, exists)
    bh_, kh = b_ * undo, k_ * undo
    V = _read(v, origin, rows + columns, exists)
    dY = _read(dy, origin, rows + columns, exists)
    X = tl.load(states + at_chunk * N * N + square).to(tl.float32)
    dX = tl.load(d_states + at_chunk * N * N + square).to(tl.float32)
    Tinv = tl.load(inverse + at_chunk * n * n + token[:, None] * n + token[None, :])

    A_ak = _triangle(_dot(at, tl.trans(kh), PRECISION), document, n, True)
    A_rb = _triangle(_dot(rt, tl.trans(bh_), PRECISION), document, n, False)
    A_rk = _triangle(_dot(rt, tl.trans(kh), PRECISION), document, n, False)
    U = _dot(at, X, PRECISION) * sees_start + _dot(A_ak, V, PRECISION)
    U = _dot(Tinv, U, PRECISION)
    dU = _dot(tl.trans(A_rb), dY, PRECISION) + _dot(b_ * to_end, dX, PRECISION)
    dZ = _dot(tl.trans(Tinv), dU, PRECISION)
    dV = _dot(tl.trans(A_rk), dY, PRECISION) + _dot(tl.trans(A_ak), dZ, PRECISION)
    dV += _dot(k_ * to_end, dX, PRECISION)
    _write(dv, origin, rows + columns, exists, dV)

    dA_ab = _triangle(_dot(dZ, tl.trans(U), PRECISION), document, n, True)
    dA_ak = _triangle(_dot(dZ, tl.trans(V), PRECISION), document, n, True)
    dA_rb = _triangle(_dot(dY, tl.trans(U), PRECISION), document, n, False)
    dA_rk = _triangle(_dot(dY, tl.trans(V), PRECISION), document, n, False)

    d_at = _dot(dZ, tl.trans(X), PRECISION) * sees_start
    d_at += _dot(dA_ab, bh_, PRECISION) + _dot(dA_ak, kh, PRECISION)
    _write(da, origin, rows + columns, exists, d_at * before)
    d_rt = _dot(dY, tl.trans(X), PRECISION) * sees_start
    d_rt += _dot(dA_rb, bh_, PRECISION) + _dot(dA_rk, kh, PRECISION)
    _write(dr, origin, rows + columns, exists, d_rt * after)

    # What reaches Xn, times its own factor: the same numbers as in d_b and d_k, so that in the
    # running sum below they cancel to the last digit for the tokens that come later.
    b_end = _dot(U, tl.trans(dX), PRECISION) * to_end
    k_end = _dot(V, tl.trans(dX), PRECISION) * to_end
    d_bh = _dot(tl.trans(dA_ab), at, PRECISION) + _dot(tl.trans(dA_rb), rt, PRECISION)
    d_kh = _dot(tl.trans(dA_ak), at, PRECISION) + _dot(tl.trans(dA_rk), rt, PRECISION)
    d_b = b_end + d_bh * undo
    d_k = k_end + d_kh * undo
    _write(db, origin, rows + columns, exists, d_b)
    _write(dk, origin, rows + columns, exists, d_k)

    of_state = tl.sum(X * dX, 1) * tl.where(last == 0, tl.exp(end), 0.0)
    of_end = of_state + tl.sum(b_end * b_ + k_end * k_, 0)
    earlier = d_at * at  # holds the decays up to the token before
    now = d_rt * rt - d_b * b_ - d_k * k_
    d_log = tl.cumsum(now + earlier, 0, reverse=True) - earlier + of_end[None, :]
    d_w = d_log * SCALE * gate * (1.0 - gate)
    _write(dw, origin, rows + columns, exists, d_w)


class _Shape:
    """The sizes and the grid of one call."""

    def __init__(self, r: Tensor, chunk_len: int) -> None:
        self.B, self.T, self.H, self.N = r.shape
        self.chunks = triton.cdiv(self.T, chunk_len)
        self.chunk_len = chunk_len
        self.parts = max(1, self.N // VALUES_PER_PROGRAM)
        wanted = PROGRAMS_PER_PROCESSOR * _processors(r.device)
        programs = self.B * self.H * self.parts
        self.segments = max(1, min(wanted // programs, self.chunks // SEGMENT_CHUNKS))
        self.chunks_per_segment = triton.cdiv(self.chunks, self.segments)
        self.segments = triton.cdiv(self.chunks, self.chunks_per_segment)

    @property
    def sequential(self) -> tuple[int, int, int]:
        return self.parts, self.B * self.H, self.segments

    @property
    def parallel(self) -> tuple[int, int]:
        return self.chunks, self.B * self.H

    def states(self, like: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return like.new_empty(self.B, self.H, count, self.N, self.N, dtype=dtype)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def wkv7_triton(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    precision: str = "default",
    chunk_len: int = CHUNK_LEN,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence on a GPU; arguments and results as `rwkvtune.kernels.wkv7.wkv7`, without
    fp64.

    precision: what matrix products round their operands to. "high": as exact as fp32; "default":
        tf32 for 16-bit inputs and where torch may use it for fp32 ones, else as high.
    chunk_len: 16, 32 or 64.
    """
    assert precision in ("default", "high"), precision
    operands = _operands(r.dtype, precision)
    result: tuple[Tensor, Tensor] = _Wkv7.apply(r, w, k, v, a, b, state, reset, operands, chunk_len)
    return result


def _operands(dtype: torch.dtype, precision: str) -> str:
    """Triton's name for a precision. AMD's matrix units know no tf32."""
    if torch.version.hip:
        return "ieee"
    may_round = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if precision == "default" and may_round else "tf32x3"


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
        precision: str,
        chunk_len: int,
    ) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b = (x.contiguous() for x in (r, w, k, v, a, b))
        reset = None if reset is None else reset.contiguous().view(torch.uint8)
        shape = _Shape(r, chunk_len)
        keep = any(ctx.needs_input_grad)
        common = {"N": shape.N, "n": chunk_len, "HAS_RESET": reset is not None}
        common |= {"PRECISION": precision}
        inverse = r.new_empty(
            shape.B, shape.H, shape.chunks, chunk_len, chunk_len, dtype=torch.float32
        )
        _invert[shape.parallel](w, a, b, inverse, reset, shape.T, shape.H, shape.chunks, **common)
        y = torch.empty_like(r)
        short = r.dtype != torch.float32 and precision == "tf32"
        kept_as = torch.bfloat16 if short else torch.float32
        states = shape.states(r, shape.chunks, kept_as) if keep else None
        sequential = common | {"VALUES": shape.N // shape.parts}

        def run(entering: Tensor | None, **flags: bool) -> Tensor:
            final = shape.states(r, shape.segments)
            _forward[shape.sequential](
                r, w, k, v, a, b, inverse, reset, entering, y, states, final,
                shape.T, shape.H, shape.chunks, shape.segments, shape.chunks_per_segment,
                HAS_STATE=entering is not None, **flags, **sequential,
            )  # fmt: skip
            return final

        entering, transfers = None if state is None else state.contiguous(), None
        if shape.segments > 1:
            alone = {"WRITE_Y": False, "WRITE_STATES": False}
            transfers = run(None, IDENTITY=True, **alone)
            entering = _scan(run(None, IDENTITY=False, **alone), transfers, entering)
        final = run(entering, IDENTITY=False, WRITE_Y=True, WRITE_STATES=keep)
        ctx.save_for_backward(r, w, k, v, a, b, reset, inverse, states, transfers)
        ctx.shape, ctx.common = shape, common
        return y, final[:, :, -1].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        r, w, k, v, a, b, reset, inverse, states, transfers = ctx.saved_tensors
        shape, common = ctx.shape, ctx.common
        dy = dy.contiguous()
        d_states = torch.empty_like(states)
        sequential = common | {"VALUES": shape.N // shape.parts}

        def run(d_leaving: Tensor | None, write: bool) -> Tensor:
            d_entering = shape.states(r, shape.segments)
            _state_gradient[shape.sequential](
                r, w, a, b, inverse, reset, dy, d_leaving, d_states, d_entering,
                shape.T, shape.H, shape.chunks, shape.segments, shape.chunks_per_segment,
                HAS_FINAL=d_leaving is not None, WRITE_STATES=write, **sequential,
            )  # fmt: skip
            return d_entering

        d_leaving = d_final.contiguous()
        if transfers is not None:
            backwards = transfers.mT.flip(2)
            d_leaving = _scan(run(None, False).flip(2), backwards, d_leaving).flip(2)
        d_state = run(d_leaving, True)[:, :, 0]
        gradients = [torch.empty_like(x) for x in (r, w, k, v, a, b)]
        _backward[shape.parallel](
            r, w, k, v, a, b, inverse, reset, dy, states, d_states, *gradients,
            shape.T, shape.H, shape.chunks, num_warps=8, **common,
        )  # fmt: skip
        needed = ctx.needs_input_grad
        wanted = [g if need else None for g, need in zip(gradients, needed, strict=False)]
        return (*wanted, d_state.contiguous() if needed[6] else None, None, None, None)


def _scan(own: Tensor, transfers: Tensor, first: Tensor | None) -> Tensor:
    """The state that enters each segment: first, then S_next = S transfer + own, in turn.

    own, transfers: [B, H, segments, N, N].  first: [B, H, N, N] or None for zeros.
    """
    entering = torch.empty_like(own)
    S = torch.zeros_like(own[:, :, 0]) if first is None else first
    for i in range(own.shape[2]):
        entering[:, :, i] = S
        S = S @ transfers[:, :, i] + own[:, :, i]
    return entering
