"""The x060 recurrence on a GPU, and x052's on the same kernels: four of them in Triton.

For one head and one chunk of n tokens that enters with the state X0 [key, value]; d_t is the decay
of token t, between 0 and 1 with both ends:

    R_t = r_t d_1 .. d_{t-1}     K_s = k_s d_{s+1} .. d_n     E = d_1 .. d_n
    A_ts = sum over channels of r_t k_s d_{s+1} .. d_{t-1} for s < t, of r_t u k_t for s = t

    _scores          A                                                 all chunks at once
    _forward         Y = R X0 + A V        Xn = diag(E) X0 + Kᵀ V      chunk after chunk
    _state_gradient  dX0 = Rᵀ dY + diag(E) dXn                         chunk after chunk, in reverse
    _backward        everything else, from X0 and dXn of each chunk    all chunks at once

A product of decays may be 0 or very near 1, so none is divided by, and no logarithm of one is the
difference of two sums: the logarithm of d_{s+1} .. d_{t-1} is built up while s goes down, and sums
before or after a token leave that token out by reading the decays one place off. So every
exponential is of a sum of terms that are not positive. The gradient of a decay adds up exactly the
pairs of tokens on both sides of it.

How the sequential kernels fill a device is told in `rwkvtune.kernels.triton_gpu`. Kept for the
backward: the inputs, A in fp32 and the state that enters each chunk, bf16 for 16-bit inputs at
default precision.
"""

from __future__ import annotations

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
from .reference import LARGEST_RAW_DECAY

LARGEST = tl.constexpr(LARGEST_RAW_DECAY)


@triton.jit
def _log_decays(w, bh, first, T, H, N: tl.constexpr, n: tl.constexpr,
                OFF: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Logarithms [n, N] of the decays of the chunk's tokens, or of their neighbours OFF places on;
    0 for what is not in the chunk or does not exist.  SHARED: w is [H, N], the same for all."""
    row = tl.arange(0, n) + OFF
    column = tl.arange(0, N)[None, :]
    inside = ((row >= 0) & (row < n) & (first + row < T))[:, None]
    if SHARED:
        raw = tl.load(w + (bh % H) * N + column + tl.zeros([n, 1], tl.int32))
    else:
        origin = ((bh // H).to(tl.int64) * T + first) * H * N + (bh % H) * N
        raw = tl.load(w + origin + (row * (H * N))[:, None] + column, mask=inside, other=0.0)
    return tl.where(inside, -tl.exp(tl.minimum(raw.to(tl.float32), LARGEST)), 0.0)


@triton.jit
def _row(tile, token, i):
    """Row i of a tile [n, N], as [1, N]."""
    return tl.sum(tl.where(token[:, None] == i, tile, 0.0), 0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _scores(r, k, w, u, scores, reset, T, H, chunks,
            N: tl.constexpr, n: tl.constexpr, HAS_RESET: tl.constexpr,
            SHARED: tl.constexpr):  # fmt: skip
    chunk, bh = chunk_and_head(H, chunks)
    columns = tl.arange(0, N)[None, :]
    token = tl.arange(0, n)
    origin, rows, exists = place(bh, chunk, T, H, N, n)
    log = _log_decays(w, bh, chunk * n, T, H, N, n, 0, SHARED)
    r_ = read(r, origin, rows + columns, exists)
    k_ = read(k, origin, rows + columns, exists)
    bonus = tl.load(u + (bh % H) * N + columns).to(tl.float32)
    A = tl.where(token[:, None] == token[None, :], tl.sum(r_ * bonus * k_, 1)[:, None], 0.0)
    between = tl.zeros([n, N], tl.float32)
    for step in range(1, n):
        s = n - 1 - step
        # From s + 1 up to the token before each: one decay more than in the round before.
        between += tl.where(token[:, None] > s + 1, _row(log, token, s + 1), 0.0)
        column = tl.sum(r_ * tl.exp(between) * _row(k_, token, s), 1)
        A += tl.where((token[None, :] == s) & (token[:, None] > s), column[:, None], 0.0)
    document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
    A = triangle(A, document, n, False)
    square = token[:, None] * n + token[None, :]
    tl.store(scores + (bh.to(tl.int64) * chunks + chunk) * n * n + square, A)


@triton.jit(do_not_specialize=SIZES)
def _forward(r, k, v, w, scores, reset, state, y, states, final,
             T, H, chunks, segments, chunks_per_segment,
             N: tl.constexpr, n: tl.constexpr, VALUES: tl.constexpr,
             HAS_RESET: tl.constexpr, SHARED: tl.constexpr, HAS_STATE: tl.constexpr,
             IDENTITY: tl.constexpr, WRITE_Y: tl.constexpr, WRITE_STATES: tl.constexpr,
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
        document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
        last = last_of(document, HAS_RESET)
        if not IDENTITY:
            V = read(v, origin, rows + values, exists)
        if WRITE_Y:
            before = tl.cumsum(_log_decays(w, bh, chunk * n, T, H, N, n, -1, SHARED), 0)
            R = read(r, origin, rows + columns, exists) * tl.exp(before)
            A = tl.load(scores + at_chunk * n * n + token[:, None] * n + token[None, :])
            Y = dot(R, X, PRECISION) * tl.where(document == 0, 1.0, 0.0)[:, None]
            write(y, origin, rows + values, exists, Y + dot(A, V, PRECISION))
        end = tl.sum(_log_decays(w, bh, chunk * n, T, H, N, n, 0, SHARED), 0)
        X *= tl.where(last == 0, tl.exp(end), 0.0)[:, None]
        if not IDENTITY:
            after = _log_decays(w, bh, chunk * n, T, H, N, n, 1, SHARED)
            K = read(k, origin, rows + columns, exists) * tl.exp(tl.cumsum(after, 0, reverse=True))
            K *= tl.where(document == last, 1.0, 0.0)[:, None]
            X += dot(tl.trans(K), V, PRECISION)
    tl.store(final + start + square, X)


@triton.jit(do_not_specialize=SIZES)
def _state_gradient(r, w, reset, dy, d_final, d_states, d_state,
                    T, H, chunks, segments, chunks_per_segment,
                    N: tl.constexpr, n: tl.constexpr, VALUES: tl.constexpr,
                    HAS_RESET: tl.constexpr, SHARED: tl.constexpr, HAS_FINAL: tl.constexpr,
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
    first = segment * chunks_per_segment
    stop = tl.minimum(first + chunks_per_segment, chunks)
    for step in range(0, stop - first):
        chunk = stop - 1 - step
        at_chunk = bh.to(tl.int64) * chunks + chunk
        if WRITE_STATES:
            tl.store(d_states + at_chunk * N * N + square, dX.to(d_states.dtype.element_ty))
        origin, rows, exists = place(bh, chunk, T, H, N, n)
        document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
        last = last_of(document, HAS_RESET)
        before = tl.cumsum(_log_decays(w, bh, chunk * n, T, H, N, n, -1, SHARED), 0)
        R = read(r, origin, rows + columns, exists) * tl.exp(before)
        R *= tl.where(document == 0, 1.0, 0.0)[:, None]
        end = tl.sum(_log_decays(w, bh, chunk * n, T, H, N, n, 0, SHARED), 0)
        dX *= tl.where(last == 0, tl.exp(end), 0.0)[:, None]
        dX += dot(tl.trans(R), read(dy, origin, rows + values, exists), PRECISION)
    tl.store(d_state + start + square, dX)


@triton.jit(do_not_specialize=SIZES)
def _backward(r, k, v, w, u, scores, reset, dy, states, d_states,
              dr, dk, dv, dw, du, T, H, chunks,
              N: tl.constexpr, n: tl.constexpr, HAS_RESET: tl.constexpr,
              SHARED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """du, and dw where w is shared, get a row per chunk, to be summed."""
    chunk, bh = chunk_and_head(H, chunks)
    at_chunk = bh.to(tl.int64) * chunks + chunk
    columns = tl.arange(0, N)[None, :]
    square = columns * N + tl.arange(0, N)[:, None]
    token = tl.arange(0, n)
    origin, rows, exists = place(bh, chunk, T, H, N, n)
    document = documents(reset, bh, chunk, T, H, n, HAS_RESET)
    last = last_of(document, HAS_RESET)
    log = _log_decays(w, bh, chunk * n, T, H, N, n, 0, SHARED)
    to_start = tl.exp(tl.cumsum(_log_decays(w, bh, chunk * n, T, H, N, n, -1, SHARED), 0))
    to_start *= tl.where(document == 0, 1.0, 0.0)[:, None]
    to_end = _log_decays(w, bh, chunk * n, T, H, N, n, 1, SHARED)
    to_end = tl.exp(tl.cumsum(to_end, 0, reverse=True))
    to_end *= tl.where(document == last, 1.0, 0.0)[:, None]
    end = tl.where(last == 0, tl.exp(tl.sum(log, 0)), 0.0)

    r_ = read(r, origin, rows + columns, exists)
    k_ = read(k, origin, rows + columns, exists)
    V = read(v, origin, rows + columns, exists)
    dY = read(dy, origin, rows + columns, exists)
    X = tl.load(states + at_chunk * N * N + square).to(tl.float32)
    dX = tl.load(d_states + at_chunk * N * N + square).to(tl.float32)
    A = tl.load(scores + at_chunk * n * n + token[:, None] * n + token[None, :])
    dV = dot(tl.trans(A), dY, PRECISION) + dot(k_ * to_end, dX, PRECISION)
    write(dv, origin, rows + columns, exists, dV)
    dA = triangle(dot(dY, tl.trans(V), PRECISION), document, n, False)

    # Through the state, and what that tells the decays: those before a token with R, those after
    # one with K, and all of the chunk with E.
    d_r = dot(dY, tl.trans(X), PRECISION) * to_start
    d_k = dot(V, tl.trans(dX), PRECISION) * to_end
    later = tl.where(token[None, :] > token[:, None], 1.0, 0.0)  # [n, n]
    d_log = dot(later, d_r * r_, PRECISION) + dot(tl.trans(later), d_k * k_, PRECISION)
    d_log += (end * tl.sum(X * dX, 1))[None, :]

    # Through A, pair by pair, with s going down as in _scores.
    between = tl.zeros([n, N], tl.float32)
    for step in range(1, n):
        s = n - 1 - step
        between += tl.where(token[:, None] > s + 1, _row(log, token, s + 1), 0.0)
        d_column = tl.sum(tl.where(token[None, :] == s, dA, 0.0), 1)[:, None]  # [n, 1]
        weighted = tl.where(token[:, None] > s, d_column * tl.exp(between), 0.0)
        key = _row(k_, token, s)
        d_r += weighted * key
        d_k += tl.where(token[:, None] == s, tl.sum(weighted * r_, 0)[None, :], 0.0)
        pairs = dot(later, weighted * r_ * key, PRECISION)
        d_log += tl.where(token[:, None] > s, pairs, 0.0)

    bonus = tl.load(u + (bh % H) * N + columns).to(tl.float32)
    own = tl.sum(tl.where(token[:, None] == token[None, :], dA, 0.0), 1)[:, None]  # [n, 1]
    write(dr, origin, rows + columns, exists, d_r + own * bonus * k_)
    write(dk, origin, rows + columns, exists, d_k + own * bonus * r_)
    of_chunk = at_chunk * N + tl.arange(0, N)
    tl.store(du + of_chunk, tl.sum(own * r_ * k_, 0))
    # d log(decay) / dw = log(decay), and nothing where w is beyond its bound: there the decay and
    # its whole gradient are 0 in fp32.
    if SHARED:
        tl.store(dw + of_chunk, tl.sum(d_log * log, 0))
    else:
        write(dw, origin, rows + columns, exists, d_log * log)


def wkv6_triton(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence on a GPU; arguments and results as `rwkvtune.kernels.wkv6.wkv6`, without
    fp64, and w may be [H, N] too: one decay for all tokens (x052).

    precision: as in `rwkvtune.kernels.wkv7.triton_gpu.wkv7_triton`.
    """
    operands = operands_of(r.dtype, precision)
    result: tuple[Tensor, Tensor] = run_on_device(_Wkv6, r, k, v, w, u, state, reset, operands)
    return result


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
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        r, k, v, w, u = (x.contiguous() for x in (r, k, v, w, u))
        reset = None if reset is None else reset.contiguous().view(torch.uint8)
        spread, n = Spread(r, CHUNK_LEN), CHUNK_LEN
        keep = any(ctx.needs_input_grad)
        common = {"N": spread.N, "n": n, "HAS_RESET": reset is not None, "SHARED": w.dim() == 2}
        sizes = (spread.T, spread.H, spread.chunks)
        scores = r.new_empty(spread.B, spread.H, spread.chunks, n, n, dtype=torch.float32)
        _scores[spread.parallel](r, k, w, u, scores, reset, *sizes, **common)
        y = torch.empty_like(r)
        states = spread.kept_states(r, precision) if keep else None

        def run(entering: Tensor | None, **flags: bool) -> Tensor:
            final = spread.states(r, spread.segments)
            _forward[spread.sequential](
                r, k, v, w, scores, reset, entering, y, states, final,
                *sizes, spread.segments, spread.chunks_per_segment, PRECISION=precision,
                VALUES=spread.values, HAS_STATE=entering is not None, **flags, **common,
            )  # fmt: skip
            return final

        final, transfers = spread.run_segments(run, state, keep)
        ctx.save_for_backward(r, k, v, w, u, reset, scores, states, transfers)
        ctx.spread, ctx.common, ctx.precision = spread, common, precision
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, w, u, reset, scores, states, transfers = ctx.saved_tensors
        spread, common = ctx.spread, ctx.common
        dy = dy.contiguous()
        d_states = torch.empty_like(states)
        sizes = (spread.T, spread.H, spread.chunks)

        def run(d_leaving: Tensor | None, write: bool) -> Tensor:
            d_entering = spread.states(r, spread.segments)
            _state_gradient[spread.sequential](
                r, w, reset, dy, d_leaving, d_states, d_entering,
                *sizes, spread.segments, spread.chunks_per_segment, PRECISION=ctx.precision,
                VALUES=spread.values, HAS_FINAL=d_leaving is not None, WRITE_STATES=write,
                **common,
            )  # fmt: skip
            return d_entering

        d_state = spread.run_segments_back(run, d_final, transfers)
        dr, dk, dv = (torch.empty_like(x) for x in (r, k, v))
        per_chunk = (spread.B, spread.H, spread.chunks, spread.N)
        du = r.new_empty(per_chunk, dtype=torch.float32)
        is_shared = common["SHARED"]
        dw = r.new_empty(per_chunk, dtype=torch.float32) if is_shared else torch.empty_like(w)
        _backward[spread.parallel](
            r, k, v, w, u, scores, reset, dy, states, d_states, dr, dk, dv, dw, du,
            *sizes, PRECISION=ctx.precision, num_warps=8 if spread.N > 64 else 4, **common,
        )  # fmt: skip
        if is_shared:
            dw = dw.sum((0, 2)).to(w.dtype)
        gradients = (dr, dk, dv, dw, du.sum((0, 2)).to(u.dtype), d_state)
        needed = ctx.needs_input_grad
        wanted = [g if need else None for g, need in zip(gradients, needed, strict=False)]
        return (*wanted, None, None)
