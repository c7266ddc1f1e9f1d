"""The pieces around the recurrence against their formulas under autograd, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rwkvtune.kernels.fused.time_mix import (
    norm_bonus_gate,
    norm_bonus_gate_reference,
    norm_gate,
    norm_gate_reference,
    prepare_keys,
    prepare_keys_reference,
    squared_relu,
)

Outputs = Tensor | tuple[Tensor, ...]


def key_inputs(B: int, T: int, H: int, N: int) -> list[Tensor]:
    """k, a_logit, k_k, k_a."""
    torch.manual_seed(B + T + H + N)
    C = H * N
    return [torch.randn(B, T, C), torch.randn(B, T, C), torch.randn(C), torch.randn(C)]


def norm_inputs(B: int, T: int, H: int, N: int) -> list[Tensor]:
    """y, r, k, v, g, r_k, weight, bias."""
    torch.manual_seed(B + T + H + N)
    heads = [torch.randn(B, T, H, N) for _ in range(4)]
    return [
        *heads,
        torch.randn(B, T, H * N),
        torch.randn(H, N),
        torch.randn(H * N),
        torch.randn(H * N),
    ]


def gate_inputs(B: int, T: int, H: int, N: int) -> list[Tensor]:
    """y, gate, weight, bias."""
    torch.manual_seed(B + T + H + N)
    C = H * N
    return [torch.randn(B, T, H, N), torch.randn(B, T, C), torch.randn(C), torch.randn(C)]


def outputs_and_gradients(
    function: Callable[..., Outputs],
    inputs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    *extra: object,
) -> list[Tensor]:
    """Everything a function gives for the same random gradients of its outputs, in fp64."""
    leaves = [x.to(d).requires_grad_() for x, d in zip(inputs, dtypes, strict=True)]
    outputs = function(*leaves, *extra)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(0)
    upstream = [torch.randn(out.shape).to(outputs[0].dtype).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [x.detach().double() for x in (*outputs, *gradients)]


def assert_close(found: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> None:
    """Relative error in the Frobenius norm, of each tensor."""
    for index, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), index


SHAPES = [(2, 17, 3, 16), (1, 1, 1, 64), (3, 8, 2, 32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_prepare_keys_follows_its_formula(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    inputs, head_size = key_inputs(*shape), shape[3]
    found = outputs_and_gradients(prepare_keys, inputs, [dtype] * 4, head_size)
    truth = outputs_and_gradients(prepare_keys_reference, inputs, [torch.float64] * 4, head_size)
    assert_close(found, truth, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_norm_bonus_gate_follows_its_formula(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = norm_inputs(*shape)
    found = outputs_and_gradients(norm_bonus_gate, inputs, [dtype] * 8, 64e-5)
    truth = outputs_and_gradients(norm_bonus_gate_reference, inputs, [torch.float64] * 8, 64e-5)
    assert_close(found, truth, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_norm_gate_follows_its_formula(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = gate_inputs(*shape)
    found = outputs_and_gradients(norm_gate, inputs, [dtype] * 4, 64e-5)
    truth = outputs_and_gradients(norm_gate_reference, inputs, [torch.float64] * 4, 64e-5)
    assert_close(found, truth, tolerance)


@pytest.mark.parametrize("piece", ["keys", "norm", "gate"])
def test_bf16_activations_with_fp32_vectors_round_no_more_than_the_formula_does(piece: str) -> None:
    function: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    extra: float
    if piece == "keys":
        function, reference, inputs, vectors, extra = (
            prepare_keys, prepare_keys_reference, key_inputs(4, 64, 4, 32), 2, 32,
        )  # fmt: skip
    elif piece == "gate":
        function, reference, inputs, vectors, extra = (
            norm_gate, norm_gate_reference, gate_inputs(4, 64, 4, 32), 2, 64e-5,
        )  # fmt: skip
    else:
        function, reference, inputs, vectors, extra = (
            norm_bonus_gate, norm_bonus_gate_reference, norm_inputs(4, 64, 4, 32), 3, 64e-5,
        )  # fmt: skip
    activations = len(inputs) - vectors
    inputs = [x.bfloat16().float() for x in inputs]
    dtypes = [torch.bfloat16] * activations + [torch.float32] * vectors
    truth = outputs_and_gradients(reference, inputs, [torch.float64] * len(inputs), extra)
    ours = outputs_and_gradients(function, inputs, dtypes, extra)
    plain = outputs_and_gradients(reference, inputs, dtypes, extra)
    for index, (a, b, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        error, rounding = (a - exact).norm(), (b - exact).norm()
        # 8 bits: 2^-9 for one rounding, a few of them in a row; a wrong formula is off by far more.
        assert error < max(1.5 * float(rounding), 4e-3 * float(exact.norm())), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_of_zeros_gives_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    inputs = key_inputs(1, 3, 1, 16)
    inputs[0][0, 1] = 0
    types = [dtype, dtype, torch.float32, torch.float32]
    found = outputs_and_gradients(prepare_keys, inputs, types, 16)
    assert not found[1][0, 1].any()  # -kk
    assert all(torch.isfinite(x).all() for x in found)


def test_squared_relu_and_its_derivative_are_those_of_the_formula() -> None:
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    y = squared_relu(x)
    assert torch.equal(y, torch.tensor([0, 0, 0.25, 9], dtype=torch.float64))
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([0, 0, 1, 6], dtype=torch.float64))  # type: ignore[arg-type]
