"""The small tensors around the recurrences: x070's keys before it; norm, bonus and gate after it.

Each token passes through about twenty elementwise operations per block. Autograd keeps most of
their results and reads them once more each; the functions here keep only their inputs. Each takes
the backend of the recurrence, which decides for all of them: see `fuses_with_triton`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvtune.kernels.calls import apply, without_autocast
from rwkvtune.kernels.dispatch import fuses_with_triton
from rwkvtune.kernels.fused.token_shift import column_sum

SMALLEST_NORM = 1e-12
"""Divisor of a key whose norm is smaller (torch's normalize); in fp16, which has no such number,
its smallest normal one, so that neither it nor its inverse is 0 or infinite."""


def _smallest_norm(dtype: torch.dtype) -> float:
    return max(SMALLEST_NORM, torch.finfo(dtype).tiny)


def prepare_keys_reference(
    k: Tensor, a_logit: Tensor, k_k: Tensor, k_a: Tensor, head_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of `prepare_keys`, for autograd."""
    B, T, C = k.shape
    a = torch.sigmoid(a_logit)
    heads = (k * k_k.to(k.dtype)).view(B, T, -1, head_size)
    kk = F.normalize(heads, dim=-1, p=2.0, eps=_smallest_norm(k.dtype)).view(B, T, C)
    return k * (1 + (a - 1) * k_a.to(k.dtype)), -kk, kk * a


class _PrepareKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, a_logit: Tensor, k_k: Tensor, k_a: Tensor, head_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, C = k.shape
        k_k, k_a = k_k.to(k.dtype), k_a.to(k.dtype)
        a = torch.sigmoid(a_logit)
        removal = k * k_k  # becomes -kk
        heads = removal.view(B, T, -1, head_size)
        norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
        norm.clamp_min_(_smallest_norm(k.dtype))
        heads.mul_(norm.reciprocal_().neg_())  # norm holds -1/|k k_k| from here on
        new_k = torch.addcmul(k, (a - 1).mul_(k_a), k)
        insertion = (removal * a).neg_()  # kk * a
        ctx.save_for_backward(k, a, removal, norm, k_k, k_a)
        ctx.head_size = head_size
        return new_k, removal, insertion

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, a, removal, norm, k_k, k_a = ctx.saved_tensors
        dk_new, dremoval, dinsertion = grads
        B, T, C = k.shape
        shape = (B, T, -1, ctx.head_size)
        # With n = -kk (removal): insertion = -n a, new_k = k + k (a - 1) k_a.
        dn = torch.addcmul(dremoval, dinsertion, a, value=-1)
        a_minus_1 = a - 1
        dk_scaled = dk_new * k
        da = torch.addcmul(dk_scaled * k_a, dinsertion, removal, value=-1)
        dk_a = column_sum(dk_scaled * a_minus_1)
        dk = torch.addcmul(dk_new, a_minus_1 * k_a, dk_new)
        da.mul_(a).mul_(a_minus_1).neg_()  # sigmoid' = a (1 - a)
        # n = -u / |u|, u = k k_k: du = -(dn - n (n . dn)) / |u|
        along = (dn * removal).view(shape).sum(-1, keepdim=True)
        du = torch.addcmul(dn.view(shape), removal.view(shape), along, value=-1)
        du = du.mul_(norm).view(B, T, C)
        dk.addcmul_(du, k_k)
        return dk, da, column_sum(du * k), dk_a, None


def prepare_keys(
    k: Tensor,
    a_logit: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    head_size: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys as the x070 recurrence takes them.

        a = sigmoid(a_logit)    kk = k k_k / |k k_k| per head    new_k = k (1 + (a - 1) k_a)

    k, a_logit: [B, T, C], fp32 or bf16.  k_k, k_a: [C], any float type.
    Returns new_k, -kk and kk * a, each [B, T, C] in k's type: the recurrence's k, a and b.
    Source: RWKV-7 "Goose", arXiv:2503.14456; the norm's smallest divisor is torch's.
    """
    if fuses_with_triton(k, head_size, backend):
        from . import triton_gpu

        return triton_gpu.prepare_keys(k, a_logit, k_k, k_a, head_size, _smallest_norm(k.dtype))
    with without_autocast(k.device.type):
        keys = apply(_PrepareKeys, k, a_logit, k_k, k_a, head_size)
    return cast("tuple[Tensor, Tensor, Tensor]", keys)


def norm_bonus_gate_reference(
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
    """The formulas of `norm_bonus_gate`, for autograd."""
    B, T, H, N = y.shape
    dtype = y.dtype
    normed = F.layer_norm(y, (N,), eps=eps).view(B, T, H * N)
    normed = normed * weight.to(dtype) + bias.to(dtype)
    bonus = (r * k * r_k.to(dtype)).sum(dim=-1, keepdim=True) * v
    return (normed + bonus.reshape(B, T, H * N)) * g


class _NormBonusGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        B, T, H, N = y.shape
        C, dtype = H * N, y.dtype
        r_k, weight, bias = r_k.to(dtype), weight.to(dtype), bias.to(dtype)
        normed, mean, rstd = torch.native_layer_norm(y, (N,), None, None, eps)
        alike = (r * k).mul_(r_k).sum(dim=-1, keepdim=True)  # [B,T,H,1]
        before_gate = torch.addcmul(bias, normed.view(B, T, C), weight)
        before_gate.view(B, T, H, N).addcmul_(alike, v)
        ctx.save_for_backward(y, mean, rstd, normed, r, k, v, g, r_k, weight, alike, before_gate)
        return before_gate * g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, rstd, normed, r, k, v, g, r_k, weight, alike, before_gate = ctx.saved_tensors
        B, T, H, N = y.shape
        dg = dout * before_gate
        dbefore = dout * g  # [B,T,C]
        dbias = column_sum(dbefore)
        dweight = column_sum(dbefore * normed.view_as(dbefore))
        heads = dbefore.view(B, T, H, N)
        dalike = (heads * v).sum(dim=-1, keepdim=True)
        dv = heads * alike
        drk = r_k * dalike  # [B,T,H,N]
        dr, dk = drk * k, drk * r
        dr_k = column_sum((r * k).mul_(dalike))  # [H,N]
        dnormed = (dbefore * weight).view(B, T, H, N)
        dy, _, _ = torch.ops.aten.native_layer_norm_backward(
            dnormed, y, (N,), mean, rstd, None, None, [True, False, False]
        )
        return dy, dr, dk, dv, dg, dr_k, dweight, dbias, None


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
    *,
    backend: str = "auto",
) -> Tensor:
    """What follows the x070 recurrence, up to the output projection.

        out = (groupnorm(y) weight + bias + v sum_j(r_j k_j r_k_j)) g      norm and sum per head

    y, r, k, v: [B, T, H, N], fp32 or bf16; k as the recurrence took it.  g: [B, T, H * N].
    r_k: [H, N]; weight, bias: [H * N], any float type.  Returns [B, T, H * N] in y's type.
    Source: RWKV-7 "Goose", arXiv:2503.14456.
    """
    if fuses_with_triton(y, y.shape[3], backend):
        from . import triton_gpu

        return triton_gpu.norm_bonus_gate(y, r, k, v, g, r_k, weight, bias, eps)
    with without_autocast(y.device.type):
        out = apply(_NormBonusGate, y, r, k, v, g, r_k, weight, bias, eps)
    return cast(Tensor, out)


def norm_gate_reference(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The formula of `norm_gate`, for autograd."""
    B, T, H, N = y.shape
    normed = F.layer_norm(y, (N,), eps=eps).view(B, T, H * N)
    return (normed * weight.to(y.dtype) + bias.to(y.dtype)) * F.silu(gate)


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        B, T, H, N = y.shape
        weight, bias = weight.to(y.dtype), bias.to(y.dtype)
        normed, mean, rstd = torch.native_layer_norm(y, (N,), None, None, eps)
        ctx.save_for_backward(y, mean, rstd, normed, gate, weight, bias)
        before_gate = torch.addcmul(bias, normed.view(B, T, H * N), weight)
        return before_gate.mul_(F.silu(gate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, rstd, normed, gate, weight, bias = ctx.saved_tensors
        B, T, H, N = y.shape
        normed = normed.view(B, T, H * N)
        before_gate = torch.addcmul(bias, normed, weight)
        dgate = torch.ops.aten.silu_backward(before_gate.mul_(dout), gate)
        dbefore = F.silu(gate).mul_(dout)  # [B,T,C]
        dbias = column_sum(dbefore)
        dweight = column_sum(dbefore * normed)
        dy, _, _ = torch.ops.aten.native_layer_norm_backward(
            dbefore.mul_(weight).view(B, T, H, N),
            y, (N,), mean, rstd, None, None, [True, False, False],
        )  # fmt: skip
        return dy, dgate, dweight, dbias, None


def norm_gate(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """What follows the x052 and x060 recurrences, up to the output projection.

        out = (groupnorm(y) weight + bias) silu(gate)      norm per head

    y: [B, T, H, N], fp32 or bf16.  gate: [B, T, H * N] of its dtype.  weight, bias: [H * N], any
    float type.  Returns [B, T, H * N] in y's type.  Source: "Eagle and Finch", arXiv:2404.05892.
    """
    if fuses_with_triton(y, y.shape[3], backend):
        from . import triton_gpu

        return triton_gpu.norm_gate(y, gate, weight, bias, eps)
    with without_autocast(y.device.type):
        out = apply(_NormGate, y, gate, weight, bias, eps)
    return cast(Tensor, out)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        dx: Tensor = (dout * positive).mul_(2)
        return dx


def squared_relu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)^2, any shape and float type, keeping one tensor for its backward."""
    if fuses_with_triton(x, backend=backend):
        from . import triton_gpu

        return triton_gpu.squared_relu(x)
    return cast(Tensor, apply(_SquaredRelu, x))


def value_residual(v: Tensor, first: Tensor, logit: Tensor, *, backend: str = "auto") -> Tensor:
    """x070's value, blended with that of the first block: v + (first - v) sigmoid(logit).

    v, first, logit: [B, T, C], one float type.  Source: RWKV-7 "Goose", arXiv:2503.14456.
    """
    if fuses_with_triton(v, backend=backend):
        from . import triton_gpu

        return triton_gpu.value_residual(v, first, logit)
    return torch.lerp(v, first, torch.sigmoid(logit))
