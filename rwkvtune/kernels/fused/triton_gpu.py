"""The fused pieces on a GPU: each forward and each backward is one Triton kernel that reads its
inputs once and writes its results once.

Formulas, arguments and results are those of `token_shift`, `time_mix` and `cross_entropy`, whose
doors call the functions here. Everything is computed in fp32. Kept for the backward are inputs
only: means, norms and gates are computed again, which costs less than fetching them. The gradients
of vectors are summed per program and then over programs, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..triton_gpu import SIZES, run_on_device

TOKENS = 32
"""Tokens per program of the pieces that work on one head or one block of channels."""
CHANNELS = 64
BLOCK = 1024
"""Elements per program of a plain elementwise piece."""


@triton.jit
def _tile(tokens, C, block, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets [TOKENS, WIDTH] of this program's part of a [tokens, C] tensor, what of it exists,
    its channels and its tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = block * WIDTH + tl.arange(0, WIDTH)
    exists = (token < tokens)[:, None] & (channel < C)[None, :]
    return token.to(tl.int64)[:, None] * C + channel[None, :], exists, channel, token


@triton.jit
def _read(x, offsets, exists):
    return tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _write(x, offsets, exists, value):
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def _vector(x, channel, C):
    return tl.load(x + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _partial(x, value, channel, C):
    """Store this program's sum over its tokens: x is [programs, C]."""
    tl.store(x + tl.program_id(0) * C + channel, tl.sum(value, 0), mask=channel < C)


# Token shift


@triton.jit
def _previous(z, before, reset, offsets, exists, channel, token, tokens, T, C,
              HAS_BEFORE: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    at_start = (token % T == 0)[:, None]
    p = _read(z, offsets - C, exists & (token > 0)[:, None] & (at_start == 0))
    if HAS_BEFORE:
        p += _read(before, (token // T)[:, None] * C + channel[None, :], exists & at_start)
    if HAS_RESET:
        p = tl.where(_starts(reset, token, tokens), 0.0, p)
    return p


@triton.jit
def _starts(reset, token, tokens):
    return (tl.load(reset + token, mask=token < tokens, other=0) != 0)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _shift(z, mix, before, reset, out, tokens, T, C, S: tl.constexpr,
           HAS_BEFORE: tl.constexpr, HAS_RESET: tl.constexpr,
           TOKENS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    offsets, exists, channel, token = _tile(tokens, C, tl.program_id(1), TOKENS, WIDTH)
    x = _read(z, offsets, exists)
    d = _previous(
        z, before, reset, offsets, exists, channel, token, tokens, T, C, HAS_BEFORE, HAS_RESET
    )
    d -= x
    size = tokens.to(tl.int64) * C
    for s in tl.static_range(S):
        _write(out + s * size, offsets, exists, x + d * _vector(mix + s * C, channel, C))


@triton.jit(do_not_specialize=SIZES)
def _shift_backward(z, mix, before, reset, g0, g1, g2, g3, g4, g5, dz, dmix, tokens, T, C,
                    S: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_RESET: tl.constexpr,
                    TOKENS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    offsets, exists, channel, token = _tile(tokens, C, tl.program_id(1), TOKENS, WIDTH)
    d = _previous(
        z, before, reset, offsets, exists, channel, token, tokens, T, C, HAS_BEFORE, HAS_RESET
    )
    d -= _read(z, offsets, exists)
    # The next token sees this one unless it is in another row or starts a document.
    seen = exists & ((token % T) < T - 1)[:, None]
    if HAS_RESET:
        seen = seen & (_starts(reset, token + 1, tokens) == 0)
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for s in tl.static_range(S):
        if s == 0:
            g = g0
        elif s == 1:
            g = g1
        elif s == 2:
            g = g2
        elif s == 3:
            g = g3
        elif s == 4:
            g = g4
        else:
            g = g5
        share = _vector(mix + s * C, channel, C)
        own = _read(g, offsets, exists)
        total += own * (1.0 - share) + _read(g, offsets + C, seen) * share
        _partial(dmix + s * tl.num_programs(0) * C, own * d, channel, C)
    _write(dz, offsets, exists, total)


class _TokenShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mix: Tensor, before: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, ...]:
        z, mix = z.contiguous(), mix.contiguous()
        before = None if before is None else before.contiguous()
        reset = None if reset is None else reset.contiguous().view(torch.uint8)
        B, T, C = z.shape
        out = z.new_empty(len(mix), B, T, C)
        grid = (triton.cdiv(B * T, TOKENS), triton.cdiv(C, CHANNELS))
        flags = {"HAS_BEFORE": before is not None, "HAS_RESET": reset is not None}
        flags |= {"S": len(mix), "TOKENS": TOKENS, "WIDTH": CHANNELS}
        _shift[grid](z, mix, before, reset, out, B * T, T, C, **flags)
        ctx.save_for_backward(z, mix, before, reset)
        ctx.grid, ctx.flags = grid, flags
        return out.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, mix, before, reset = ctx.saved_tensors
        B, T, C = z.shape
        S = len(grads)
        grads = tuple(g.contiguous() for g in grads)
        six = (*grads, *[grads[0]] * (6 - S))
        dz = torch.empty_like(z)
        dmix = z.new_empty(S, ctx.grid[0], C, dtype=torch.float32)
        _shift_backward[ctx.grid](z, mix, before, reset, *six, dz, dmix, B * T, T, C, **ctx.flags)
        dbefore = None
        if before is not None and ctx.needs_input_grad[2]:
            first = torch.stack([g[:, 0] for g in grads], 1).float()  # [B,S,C]
            dbefore = (first * mix).sum(1)
            if reset is not None:
                dbefore = dbefore.masked_fill(reset[:, :1] != 0, 0)
            dbefore = dbefore.to(before.dtype)
        return dz, dmix.sum(1).to(mix.dtype), dbefore, None


def token_shift_mix(
    z: Tensor, mix: Tensor, before: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = run_on_device(_TokenShiftMix, z, mix, before, reset)
    return result


# Keys of x070


@triton.jit(do_not_specialize=SIZES)
def _keys(k, a_logit, k_k, k_a, new_k, removal, insertion, tokens, C, smallest,
          N: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    offsets, exists, channel, _ = _tile(tokens, C, tl.program_id(1), TOKENS, N)
    key = _read(k, offsets, exists)
    a = tl.sigmoid(_read(a_logit, offsets, exists))
    u = key * _vector(k_k, channel, C)
    kk = u / tl.maximum(tl.sqrt(tl.sum(u * u, 1)), smallest)[:, None]
    _write(new_k, offsets, exists, key * (1.0 + (a - 1.0) * _vector(k_a, channel, C)))
    _write(removal, offsets, exists, -kk)
    _write(insertion, offsets, exists, kk * a)


@triton.jit(do_not_specialize=SIZES)
def _keys_backward(k, a_logit, k_k, k_a, g_k, g_removal, g_insertion, dk, da, dk_k, dk_a,
                   tokens, C, smallest, N: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    offsets, exists, channel, _ = _tile(tokens, C, tl.program_id(1), TOKENS, N)
    key = _read(k, offsets, exists)
    a = tl.sigmoid(_read(a_logit, offsets, exists))
    scale, share = _vector(k_k, channel, C), _vector(k_a, channel, C)
    u = key * scale
    length = tl.sqrt(tl.sum(u * u, 1))[:, None]
    inverse = 1.0 / tl.maximum(length, smallest)
    kk = u * inverse
    g_new = _read(g_k, offsets, exists)
    g_in = _read(g_insertion, offsets, exists)
    g_kk = g_in * a - _read(g_removal, offsets, exists)
    # A key shorter than `smallest` is divided by a constant: no part of its gradient is taken off.
    along = tl.where(length > smallest, tl.sum(g_kk * kk, 1)[:, None], 0.0)
    du = (g_kk - kk * along) * inverse
    _write(dk, offsets, exists, g_new * (1.0 + (a - 1.0) * share) + du * scale)
    _write(da, offsets, exists, (g_new * key * share + g_in * kk) * a * (1.0 - a))
    _partial(dk_k, du * key, channel, C)
    _partial(dk_a, g_new * key * (a - 1.0), channel, C)


class _PrepareKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        a_logit: Tensor,
        k_k: Tensor,
        k_a: Tensor,
        head_size: int,
        smallest: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, a_logit, k_k, k_a = (x.contiguous() for x in (k, a_logit, k_k, k_a))
        B, T, C = k.shape
        outputs = [torch.empty_like(k) for _ in range(3)]
        ctx.grid = (triton.cdiv(B * T, TOKENS), C // head_size)
        ctx.sizes = (B * T, C, smallest)
        ctx.flags = {"N": head_size, "TOKENS": TOKENS}
        _keys[ctx.grid](k, a_logit, k_k, k_a, *outputs, *ctx.sizes, **ctx.flags)
        ctx.save_for_backward(k, a_logit, k_k, k_a)
        return outputs[0], outputs[1], outputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, a_logit, k_k, k_a = ctx.saved_tensors
        C = k.shape[-1]
        dk, da = torch.empty_like(k), torch.empty_like(k)
        vectors = [k.new_empty(ctx.grid[0], C, dtype=torch.float32) for _ in range(2)]
        _keys_backward[ctx.grid](
            k, a_logit, k_k, k_a, *(g.contiguous() for g in grads), dk, da, *vectors,
            *ctx.sizes, **ctx.flags,
        )  # fmt: skip
        dk_k, dk_a = (x.sum(0) for x in vectors)
        return dk, da, dk_k.to(k_k.dtype), dk_a.to(k_a.dtype), None, None


def prepare_keys(
    k: Tensor, a_logit: Tensor, k_k: Tensor, k_a: Tensor, head_size: int, smallest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """smallest: the least divisor of a key."""
    result: tuple[Tensor, Tensor, Tensor] = run_on_device(
        _PrepareKeys, k, a_logit, k_k, k_a, head_size, smallest
    )
    return result


# Norm, bonus and gate


@triton.jit
def _normed(y, eps, N: tl.constexpr):
    """Rows of y [tokens, N] with mean 0 and variance 1, and what they were divided by, inverted."""
    centred = y - tl.sum(y, 1)[:, None] / N
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / N + eps)
    return centred * rstd, rstd


@triton.jit
def _norm_backward(d_normed, normed, rstd, N: tl.constexpr):
    mean = tl.sum(d_normed, 1)[:, None] / N
    along = tl.sum(d_normed * normed, 1)[:, None] / N
    return (d_normed - mean - normed * along) * rstd


@triton.jit(do_not_specialize=SIZES)
def _bonus_gate(y, r, k, v, g, r_k, weight, bias, out, tokens, C, eps,
                N: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    offsets, exists, channel, _ = _tile(tokens, C, tl.program_id(1), TOKENS, N)
    normed, _ = _normed(_read(y, offsets, exists), eps, N)
    alike = _read(r, offsets, exists) * _read(k, offsets, exists) * _vector(r_k, channel, C)
    before_gate = normed * _vector(weight, channel, C) + _vector(bias, channel, C)
    before_gate += tl.sum(alike, 1)[:, None] * _read(v, offsets, exists)
    _write(out, offsets, exists, before_gate * _read(g, offsets, exists))


@triton.jit(do_not_specialize=SIZES)
def _bonus_gate_backward(y, r, k, v, g, r_k, weight, bias, dout,
                         dy, dr, dk, dv, dg, dr_k, dweight, dbias, tokens, C, eps,
                         N: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    offsets, exists, channel, _ = _tile(tokens, C, tl.program_id(1), TOKENS, N)
    normed, rstd = _normed(_read(y, offsets, exists), eps, N)
    r_, k_, v_ = (_read(r, offsets, exists), _read(k, offsets, exists), _read(v, offsets, exists))
    share, scale = _vector(r_k, channel, C), _vector(weight, channel, C)
    alike = tl.sum(r_ * k_ * share, 1)[:, None]
    before_gate = normed * scale + _vector(bias, channel, C) + alike * v_
    d = _read(dout, offsets, exists)
    _write(dg, offsets, exists, d * before_gate)
    d *= _read(g, offsets, exists)
    _partial(dbias, d, channel, C)
    _partial(dweight, d * normed, channel, C)
    d_alike = tl.sum(d * v_, 1)[:, None]
    _write(dv, offsets, exists, d * alike)
    _write(dr, offsets, exists, d_alike * k_ * share)
    _write(dk, offsets, exists, d_alike * r_ * share)
    _partial(dr_k, d_alike * r_ * k_, channel, C)
    _write(dy, offsets, exists, _norm_backward(d * scale, normed, rstd, N))


class _NormBonusGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, eps = inputs
        tensors = [x.contiguous() for x in tensors]
        y = tensors[0]
        B, T, H, N = y.shape
        out = y.new_empty(B, T, H * N)
        ctx.grid, ctx.sizes = (triton.cdiv(B * T, TOKENS), H), (B * T, H * N, eps)
        ctx.flags = {"N": N, "TOKENS": TOKENS}
        _bonus_gate[ctx.grid](*tensors, out, *ctx.sizes, **ctx.flags)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in tensors[:5]]
        C = ctx.sizes[1]
        vectors = [dout.new_empty(ctx.grid[0], C, dtype=torch.float32) for _ in range(3)]
        _bonus_gate_backward[ctx.grid](
            *tensors, dout.contiguous(), *gradients, *vectors, *ctx.sizes, **ctx.flags
        )
        of_vectors = [
            x.sum(0).view(like.shape).to(like.dtype)
            for x, like in zip(vectors, tensors[5:], strict=True)
        ]
        return (*gradients, *of_vectors, None)


def norm_bonus_gate(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    result: Tensor = run_on_device(_NormBonusGate, y, r, k, v, g, r_k, weight, bias, eps)
    return result


@triton.jit(do_not_specialize=SIZES)
def _silu_gate(y, gate, weight, bias, out, tokens, C, eps,
               N: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    offsets, exists, channel, _ = _tile(tokens, C, tl.program_id(1), TOKENS, N)
    normed, _ = _normed(_read(y, offsets, exists), eps, N)
    x = _read(gate, offsets, exists)
    before_gate = normed * _vector(weight, channel, C) + _vector(bias, channel, C)
    _write(out, offsets, exists, before_gate * x * tl.sigmoid(x))


@triton.jit(do_not_specialize=SIZES)
def _silu_gate_backward(y, gate, weight, bias, dout, dy, dgate, dweight, dbias, tokens, C, eps,
                        N: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    offsets, exists, channel, _ = _tile(tokens, C, tl.program_id(1), TOKENS, N)
    normed, rstd = _normed(_read(y, offsets, exists), eps, N)
    x = _read(gate, offsets, exists)
    s = tl.sigmoid(x)
    scale = _vector(weight, channel, C)
    d = _read(dout, offsets, exists)
    before_gate = normed * scale + _vector(bias, channel, C)
    _write(dgate, offsets, exists, d * before_gate * s * (1.0 + x * (1.0 - s)))
    d *= x * s
    _partial(dbias, d, channel, C)
    _partial(dweight, d * normed, channel, C)
    _write(dy, offsets, exists, _norm_backward(d * scale, normed, rstd, N))


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        tensors = [x.contiguous() for x in (y, gate, weight, bias)]
        B, T, H, N = y.shape
        out = torch.empty_like(tensors[1])
        ctx.grid, ctx.sizes = (triton.cdiv(B * T, TOKENS), H), (B * T, H * N, eps)
        ctx.flags = {"N": N, "TOKENS": TOKENS}
        _silu_gate[ctx.grid](*tensors, out, *ctx.sizes, **ctx.flags)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight, bias = ctx.saved_tensors
        dy, dgate = torch.empty_like(y), torch.empty_like(gate)
        C = ctx.sizes[1]
        dweight, dbias = (dout.new_empty(ctx.grid[0], C, dtype=torch.float32) for _ in range(2))
        _silu_gate_backward[ctx.grid](
            y, gate, weight, bias, dout.contiguous(), dy, dgate, dweight, dbias,
            *ctx.sizes, **ctx.flags,
        )  # fmt: skip
        return dy, dgate, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype), None


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    result: Tensor = run_on_device(_NormGate, y, gate, weight, bias, eps)
    return result


# Channel mix and the gate of the first block's value


@triton.jit
def _squared_relu(x, out, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < size
    positive = tl.maximum(_read(x, offsets, exists), 0.0)
    _write(out, offsets, exists, positive * positive)


@triton.jit
def _squared_relu_backward(x, dout, dx, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < size
    positive = tl.maximum(_read(x, offsets, exists), 0.0)
    _write(dx, offsets, exists, 2.0 * positive * _read(dout, offsets, exists))


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        ctx.grid = (triton.cdiv(x.numel(), BLOCK),)
        _squared_relu[ctx.grid](x, out, x.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _squared_relu_backward[ctx.grid](x, dout.contiguous(), dx, x.numel(), BLOCK=BLOCK)
        return dx


def squared_relu(x: Tensor) -> Tensor:
    result: Tensor = run_on_device(_SquaredRelu, x)
    return result


@triton.jit
def _blend_value(v, first, logit, out, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < size
    x = _read(v, offsets, exists)
    gate = tl.sigmoid(_read(logit, offsets, exists))
    _write(out, offsets, exists, x + (_read(first, offsets, exists) - x) * gate)


@triton.jit
def _blend_value_backward(v, first, logit, dout, dv, dfirst, dlogit, size,
                          BLOCK: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < size
    d = _read(dout, offsets, exists)
    gate = tl.sigmoid(_read(logit, offsets, exists))
    away = _read(first, offsets, exists) - _read(v, offsets, exists)
    _write(dv, offsets, exists, d * (1.0 - gate))
    _write(dfirst, offsets, exists, d * gate)
    _write(dlogit, offsets, exists, d * away * gate * (1.0 - gate))


class _ValueResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, first: Tensor, logit: Tensor) -> Tensor:
        v, first, logit = (x.contiguous() for x in (v, first, logit))
        out = torch.empty_like(v)
        ctx.grid = (triton.cdiv(v.numel(), BLOCK),)
        _blend_value[ctx.grid](v, first, logit, out, v.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(v, first, logit)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tensors = ctx.saved_tensors
        dv, dfirst, dlogit = (torch.empty_like(x) for x in tensors)
        _blend_value_backward[ctx.grid](
            *tensors, dout.contiguous(), dv, dfirst, dlogit, dout.numel(), BLOCK=BLOCK
        )
        return dv, dfirst, dlogit


def value_residual(v: Tensor, first: Tensor, logit: Tensor) -> Tensor:
    result: Tensor = run_on_device(_ValueResidual, v, first, logit)
    return result


# Softmax of the head


@triton.jit
def _softmax_gradient(logits, gold, counted, losses, V, l2wrap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(gold + row)
    weight = tl.load(counted + row).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    picked = tl.zeros([BLOCK], tl.float32)  # the target's logit, in its lane
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        z = tl.load(logits + begin + lane, mask=begin + lane < V, other=float("-inf"))
        z = z.to(tl.float32)
        grown = tl.maximum(largest, z)
        where = tl.where(z > largest, begin + lane, where)
        picked = tl.where(begin + lane == target, z, picked)
        # A lane that has seen nothing yet holds exp(-inf - -inf), which is not a number.
        kept = tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - grown))
        total = kept + tl.where(z == float("-inf"), 0.0, tl.exp(z - grown))
        largest = grown
    top = tl.max(largest, 0)
    # The first of several equal ones.
    first = tl.min(tl.where(largest == top, where, V), 0)
    total = tl.sum(tl.where(total > 0.0, total * tl.exp(largest - top), 0.0), 0)
    tl.store(losses + row, (tl.log(total) + top - tl.sum(picked, 0)) * weight)
    for begin in range(0, V, BLOCK):
        exists = begin + lane < V
        z = tl.load(logits + begin + lane, mask=exists, other=0.0).to(tl.float32)
        p = tl.exp(z - top) / total
        p -= tl.where(begin + lane == target, 1.0, 0.0)
        p += tl.where(begin + lane == first, l2wrap * top, 0.0)
        tl.store(logits + begin + lane, (p * weight).to(logits.dtype.element_ty), mask=exists)


def softmax_into_gradient(logits: Tensor, gold: Tensor, counted: Tensor, l2wrap: float) -> Tensor:
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    V = logits.shape[1]
    block = min(BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        _softmax_gradient[(len(logits),)](
            logits, gold, counted.view(torch.uint8), losses, V, l2wrap, BLOCK=block
        )
    return losses.sum()
