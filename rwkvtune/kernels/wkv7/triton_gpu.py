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

How the sequential kernels fill a device is told in `rwkvtune.kernels.triton_gpu`.

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

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..triton_gpu import (
    CHUNK_LEN,
    SIZES,
    Spread,
    chunk_and_head,
    documents,
    dot,
    last_of,
    operands_of,
    part_head_and_segment,
    place,
    read,
    run_on_device,
    triangle,
    write,
)
from .reference import LOG_DECAY_SCALE

SCALE = tl.constexpr(LOG_DECAY_SCALE)
LOG2_E = tl.constexpr(1 / math.log(2))
LOG2_SCALE = tl.constexpr(LOG_DECAY_SCALE / math.log(2))
STATE_IN_REGISTERS = 4096
"""Elements of a state that a program of the last kernel takes at once."""


@triton.jit
def _decays(w, origin, tile, exists):
    """sigmoid(w), the logarithm to base 2 of each decay and its running sum, [n, N]; tokens that do
    not exist decay nothing. A power of 2 is one instruction, one of e is five."""
    gate = 1.0 / (1.0 + tl.exp2(read(w, origin, tile, exists) * -LOG2_E))
    log = tl.where(exists, gate * LOG2_SCALE, 0.0)
    return gate, log, tl.cumsum(log, 0)


@triton.jit(do_not_specialize=SIZES)
def _invert(w, a, b, inverse, reset, T, H, chunks,
            N: tl.constexpr, n: tl.constexpr,
            HAS_RESET: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    chunk, bh = chunk_and_head(H, chunks)
    origin, rows, exists = place(bh, chunk, T, H, N, n)
    columns = tl.arange(0, N)[None, :]
    _, log, total = _decays(w, origin, rows + columns, exists)
    at = read(a, origin, rows + columns, exists) * tl.exp2(total - log)
    bh_ = read(b, origin, rows + columns, exists) * tl.exp2(-total)
    document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
    A = triangle(dot(at, tl.trans(bh_), PRECISION), document, n, True)
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


@triton.jit(do_not_specialize=SIZES)
def _forward(r, w, k, v, a, b, inverse, reset, state, y, states, final,
             T, H, chunks, segments, chunks_per_segment,
             N: tl.constexpr, n: tl.constexpr, VALUES: tl.constexpr,
             HAS_RESET: tl.constexpr, HAS_STATE: tl.constexpr, IDENTITY: tl.constexpr,
             WRITE_Y: tl.constexpr, WRITE_STATES: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """IDENTITY: enter with X = I and no values, so that X becomes the segment's M."""
    part, bh, segment = part_head_and_segment(N // VALUES)
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
        origin, rows, exists = place(bh, chunk, T, H, N, n)
        _, log, total = _decays(w, origin, rows + columns, exists)
        document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
        last = last_of(document, HAS_RESET)
        end = tl.exp2(tl.sum(log, 0))
        at = read(a, origin, rows + columns, exists) * tl.exp2(total - log)
        undo = tl.exp2(-total)
        bh_ = read(b, origin, rows + columns, exists) * undo
        kh = read(k, origin, rows + columns, exists) * undo
        Tinv = tl.load(inverse + at_chunk * n * n + token[:, None] * n + token[None, :])
        sees_start = tl.where(document == 0, 1.0, 0.0)[:, None]
        to_end = tl.where(document == last, 1.0, 0.0)[:, None] * end[None, :]

        Z = dot(at, X, PRECISION) * sees_start
        if IDENTITY:
            V = tl.zeros([n, VALUES], tl.float32)
        else:
            V = read(v, origin, rows + values, exists)
            A_ak = triangle(dot(at, tl.trans(kh), PRECISION), document, n, True)
            Z += dot(A_ak, V, PRECISION)
        U = dot(Tinv, Z, PRECISION)
        if WRITE_Y:
            rt = read(r, origin, rows + columns, exists) * tl.exp2(total)
            A_rb = triangle(dot(rt, tl.trans(bh_), PRECISION), document, n, False)
            A_rk = triangle(dot(rt, tl.trans(kh), PRECISION), document, n, False)
            Y = dot(rt, X, PRECISION) * sees_start
            Y += dot(A_rb, U, PRECISION) + dot(A_rk, V, PRECISION)
            write(y, origin, rows + values, exists, Y)
        X *= tl.where(last == 0, end, 0.0)[:, None]
        X += dot(tl.trans(bh_ * to_end), U, PRECISION)
        if not IDENTITY:
            X += dot(tl.trans(kh * to_end), V, PRECISION)
    tl.store(final + start + square, X)


@triton.jit(do_not_specialize=SIZES)
def _state_gradient(r, w, a, b, inverse, reset, dy, d_final, d_states, d_state,
                    T, H, chunks, segments, chunks_per_segment,
                    N: tl.constexpr, n: tl.constexpr, VALUES: tl.constexpr,
                    HAS_RESET: tl.constexpr, HAS_FINAL: tl.constexpr,
                    WRITE_STATES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    part, bh, segment = part_head_and_segment(N // VALUES)
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
        origin, rows, exists = place(bh, chunk, T, H, N, n)
        _, log, total = _decays(w, origin, rows + columns, exists)
        document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
        last = last_of(document, HAS_RESET)
        end = tl.exp2(tl.sum(log, 0))
        at = read(a, origin, rows + columns, exists) * tl.exp2(total - log)
        rt = read(r, origin, rows + columns, exists) * tl.exp2(total)
        bh_ = read(b, origin, rows + columns, exists) * tl.exp2(-total)
        dY = read(dy, origin, rows + values, exists)
        Tinv = tl.load(inverse + at_chunk * n * n + token[:, None] * n + token[None, :])
        sees_start = tl.where(document == 0, 1.0, 0.0)[:, None]
        to_end = tl.where(document == last, 1.0, 0.0)[:, None] * end[None, :]

        A_rb = triangle(dot(rt, tl.trans(bh_), PRECISION), document, n, False)
        dU = dot(tl.trans(A_rb), dY, PRECISION) + dot(bh_ * to_end, dX, PRECISION)
        dZ = dot(tl.trans(Tinv), dU, PRECISION)
        dX *= tl.where(last == 0, end, 0.0)[:, None]
        dX += dot(tl.trans(rt * sees_start), dY, PRECISION)
        dX += dot(tl.trans(at * sees_start), dZ, PRECISION)
    tl.store(d_state + start + square, dX)


@triton.jit
def _decayed(r, w, k, a, b, origin, tile, exists):
    """at, rt, bh and kh of a chunk and its decays over all of it; [n, N] and [N]."""
    _, log, total = _decays(w, origin, tile, exists)
    undo = tl.exp2(-total)
    at = read(a, origin, tile, exists) * tl.exp2(total - log)
    rt = read(r, origin, tile, exists) * tl.exp2(total)
    bh_, kh = read(b, origin, tile, exists) * undo, read(k, origin, tile, exists) * undo
    return at, rt, bh_, kh, tl.exp2(tl.sum(log, 0))


@triton.jit(do_not_specialize=SIZES)
def _backward(r, w, k, v, a, b, inverse, reset, dy, states, d_states,
              dr, dw, dk, dv, da, db, T, H, chunks,
              N: tl.constexpr, n: tl.constexpr, VALUES: tl.constexpr,
              HAS_RESET: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Block after block of values, so that no whole state lies in registers."""
    chunk, bh = chunk_and_head(H, chunks)
    at_chunk = bh.to(tl.int64) * chunks + chunk
    columns = tl.arange(0, N)[None, :]
    token = tl.arange(0, n)
    origin, rows, exists = place(bh, chunk, T, H, N, n)
    document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
    last = last_of(document, HAS_RESET)
    sees_start = tl.where(document == 0, 1.0, 0.0)[:, None]
    reaches_end = tl.where(document == last, 1.0, 0.0)[:, None]

    at, rt, bh_, kh, end = _decayed(r, w, k, a, b, origin, rows + columns, exists)
    to_end = end[None, :] * reaches_end
    Tinv = tl.load(inverse + at_chunk * n * n + token[:, None] * n + token[None, :])
    A_ak = triangle(dot(at, tl.trans(kh), PRECISION), document, n, True)
    A_rb = triangle(dot(rt, tl.trans(bh_), PRECISION), document, n, False)
    A_rk = triangle(dot(rt, tl.trans(kh), PRECISION), document, n, False)

    dA_ab = tl.zeros([n, n], tl.float32)
    dA_ak = tl.zeros([n, n], tl.float32)
    dA_rb = tl.zeros([n, n], tl.float32)
    dA_rk = tl.zeros([n, n], tl.float32)
    d_at = tl.zeros([n, N], tl.float32)
    d_rt = tl.zeros([n, N], tl.float32)
    b_end = tl.zeros([n, N], tl.float32)
    k_end = tl.zeros([n, N], tl.float32)
    of_state = tl.zeros([N], tl.float32)
    for first in range(0, N, VALUES):
        values = first + tl.arange(0, VALUES)[None, :]
        square = at_chunk * N * N + values * N + tl.arange(0, N)[:, None]
        V = read(v, origin, rows + values, exists)
        dY = read(dy, origin, rows + values, exists)
        X = tl.load(states + square).to(tl.float32)
        dX = tl.load(d_states + square).to(tl.float32)
        U = dot(at, X, PRECISION) * sees_start + dot(A_ak, V, PRECISION)
        U = dot(Tinv, U, PRECISION)
        dU = dot(tl.trans(A_rb), dY, PRECISION) + dot(bh_ * to_end, dX, PRECISION)
        dZ = dot(tl.trans(Tinv), dU, PRECISION)
        dV = dot(tl.trans(A_rk), dY, PRECISION) + dot(tl.trans(A_ak), dZ, PRECISION)
        dV += dot(kh * to_end, dX, PRECISION)
        write(dv, origin, rows + values, exists, dV)
        dA_ab += dot(dZ, tl.trans(U), PRECISION)
        dA_ak += dot(dZ, tl.trans(V), PRECISION)
        dA_rb += dot(dY, tl.trans(U), PRECISION)
        dA_rk += dot(dY, tl.trans(V), PRECISION)
        d_at += dot(dZ, tl.trans(X), PRECISION)
        d_rt += dot(dY, tl.trans(X), PRECISION)
        b_end += dot(U, tl.trans(dX), PRECISION)
        k_end += dot(V, tl.trans(dX), PRECISION)
        of_state += tl.sum(X * dX, 1)
    dA_ab = triangle(dA_ab, document, n, True)
    dA_ak = triangle(dA_ak, document, n, True)
    dA_rb = triangle(dA_rb, document, n, False)
    dA_rk = triangle(dA_rk, document, n, False)

    # Read again, since they would take registers all through the loop.
    at, rt, bh_, kh, end = _decayed(r, w, k, a, b, origin, rows + columns, exists)
    gate, log, total = _decays(w, origin, rows + columns, exists)
    d_at = d_at * sees_start + dot(dA_ab, bh_, PRECISION) + dot(dA_ak, kh, PRECISION)
    write(da, origin, rows + columns, exists, d_at * tl.exp2(total - log))
    d_rt = d_rt * sees_start + dot(dA_rb, bh_, PRECISION) + dot(dA_rk, kh, PRECISION)
    write(dr, origin, rows + columns, exists, d_rt * tl.exp2(total))

    # What reaches Xn, times its own factor: the same numbers as in d_b and d_k, so that in the
    # running sum below they cancel to the last digit for the tokens that come later.
    to_end = end[None, :] * reaches_end
    d_bh = dot(tl.trans(dA_ab), at, PRECISION) + dot(tl.trans(dA_rb), rt, PRECISION)
    d_kh = dot(tl.trans(dA_ak), at, PRECISION) + dot(tl.trans(dA_rk), rt, PRECISION)
    b_end *= to_end
    k_end *= to_end
    d_bh += b_end
    d_kh += k_end
    write(db, origin, rows + columns, exists, d_bh * tl.exp2(-total))
    write(dk, origin, rows + columns, exists, d_kh * tl.exp2(-total))

    of_end = of_state * tl.where(last == 0, end, 0.0) + tl.sum(b_end * bh_ + k_end * kh, 0)
    earlier = d_at * at  # holds the decays up to the token before
    now = d_rt * rt - d_bh * bh_ - d_kh * kh
    d_log = tl.cumsum(now + earlier, 0, reverse=True) - earlier + of_end[None, :]
    d_w = d_log * SCALE * gate * (1.0 - gate)
    write(dw, origin, rows + columns, exists, d_w)


def backward_options(N: int, precision: str) -> dict[str, int]:
    """How `_backward` is compiled for heads of this size, so that it fits into registers."""
    is_small = N <= 64 and precision == "tf32"
    return {"VALUES": min(N, STATE_IN_REGISTERS // N), "num_warps": 4 if is_small else 8}


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
    operands = operands_of(r.dtype, precision)
    result: tuple[Tensor, Tensor] = run_on_device(
        _Wkv7, r, w, k, v, a, b, state, reset, operands, chunk_len
    )
    return result


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
        spread = Spread(r, chunk_len)
        keep = any(ctx.needs_input_grad)
        common = {"N": spread.N, "n": chunk_len, "HAS_RESET": reset is not None}
        common |= {"PRECISION": precision}
        sizes = (spread.T, spread.H, spread.chunks)
        inverse = r.new_empty(
            spread.B, spread.H, spread.chunks, chunk_len, chunk_len, dtype=torch.float32
        )
        # One warp: the rows of the substitution wait for each other, and for no other warp.
        _invert[spread.parallel](w, a, b, inverse, reset, *sizes, num_warps=1, **common)
        y = torch.empty_like(r)
        states = spread.kept_states(r, precision) if keep else None

        def run(entering: Tensor | None, **flags: bool) -> Tensor:
            final = spread.states(r, spread.segments)
            _forward[spread.sequential](
                r, w, k, v, a, b, inverse, reset, entering, y, states, final,
                *sizes, spread.segments, spread.chunks_per_segment,
                VALUES=spread.values, HAS_STATE=entering is not None, **flags, **common,
            )  # fmt: skip
            return final

        final, transfers = spread.run_segments(run, state, keep)
        ctx.save_for_backward(r, w, k, v, a, b, reset, inverse, states, transfers)
        ctx.spread, ctx.common = spread, common
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        r, w, k, v, a, b, reset, inverse, states, transfers = ctx.saved_tensors
        spread, common = ctx.spread, ctx.common
        dy = dy.contiguous()
        d_states = torch.empty_like(states)
        sizes = (spread.T, spread.H, spread.chunks)

        def run(d_leaving: Tensor | None, write: bool) -> Tensor:
            d_entering = spread.states(r, spread.segments)
            _state_gradient[spread.sequential](
                r, w, a, b, inverse, reset, dy, d_leaving, d_states, d_entering,
                *sizes, spread.segments, spread.chunks_per_segment, VALUES=spread.values,
                HAS_FINAL=d_leaving is not None, WRITE_STATES=write, **common,
            )  # fmt: skip
            return d_entering

        d_state = spread.run_segments_back(run, d_final, transfers)
        gradients = [torch.empty_like(x) for x in (r, w, k, v, a, b)]
        _backward[spread.parallel](
            r, w, k, v, a, b, inverse, reset, dy, states, d_states, *gradients,
            *sizes, **backward_options(spread.N, common["PRECISION"]), **common,
        )  # fmt: skip
        needed = ctx.needs_input_grad
        wanted = [g if need else None for g, need in zip(gradients, needed, strict=False)]
        return (*wanted, d_state if needed[6] else None, None, None, None)
