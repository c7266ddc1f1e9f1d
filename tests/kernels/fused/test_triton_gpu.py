"""The fused Triton kernels in the interpreter, against the formulas under autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from rwkvtune.kernels.fused import cross_entropy, time_mix, token_shift
from tests.kernels.fused.test_time_mix import (
    Outputs,
    assert_close,
    gate_inputs,
    key_inputs,
    norm_inputs,
    outputs_and_gradients,
)
from tests.kernels.interpreted_triton import interpreted

kernels = interpreted("rwkvtune.kernels.fused.triton_gpu")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPE = (2, 21, 2, 32)  # neither side a multiple of a program's tile


def check(
    ours: Callable[..., Outputs], formula: Callable[..., Outputs], inputs: Sequence[Tensor]
) -> None:
    n = len(inputs)
    found = outputs_and_gradients(ours, inputs, [torch.float32] * n)
    truth = outputs_and_gradients(formula, inputs, [torch.float64] * n)
    assert_close(found, truth, 2e-6)  # fp32 rounding; measured up to 4e-7


@pytest.mark.parametrize("shares", [1, 2, 6])
@pytest.mark.parametrize("with_reset", [False, True])
def test_token_shift(shares: int, with_reset: bool) -> None:
    torch.manual_seed(0)
    B, T, C = 2, 37, 160
    inputs = [torch.randn(B, T, C), torch.rand(shares, C), torch.randn(B, C)]
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [0, 5, 32]] = True
    of = {"reset": reset if with_reset else None}
    check(
        lambda z, mix, before: kernels.token_shift_mix(z, mix, before, of["reset"]),
        lambda z, mix, before: token_shift.token_shift_mix_reference(z, mix, before, of["reset"]),
        inputs,
    )
    check(
        lambda z, mix: kernels.token_shift_mix(z, mix, None, of["reset"]),
        lambda z, mix: token_shift.token_shift_mix_reference(z, mix, None, of["reset"]),
        inputs[:2],
    )


def test_keys() -> None:
    ours = partial(kernels.prepare_keys, head_size=32, smallest=1e-12)
    check(ours, partial(time_mix.prepare_keys_reference, head_size=32), key_inputs(*SHAPE))


def test_a_key_of_zeros_gives_zeros_and_finite_gradients() -> None:
    inputs = key_inputs(1, 3, 1, 32)
    inputs[0][0, 1] = 0
    ours = partial(kernels.prepare_keys, head_size=32, smallest=1e-12)
    found = outputs_and_gradients(ours, inputs, [torch.float32] * 4)
    assert not found[1][0, 1].any()
    assert all(torch.isfinite(x).all() for x in found)


def test_norm_bonus_and_gate() -> None:
    ours = partial(kernels.norm_bonus_gate, eps=64e-5)
    check(ours, partial(time_mix.norm_bonus_gate_reference, eps=64e-5), norm_inputs(*SHAPE))


def test_norm_and_gate() -> None:
    ours = partial(kernels.norm_gate, eps=64e-5)
    check(ours, partial(time_mix.norm_gate_reference, eps=64e-5), gate_inputs(*SHAPE))


def test_squared_relu() -> None:
    torch.manual_seed(0)
    check(kernels.squared_relu, lambda x: x.relu().square(), [torch.randn(3, 1700)])


def test_value_residual() -> None:
    torch.manual_seed(0)
    check(
        kernels.value_residual,
        lambda v, first, logit: v + (first - v) * torch.sigmoid(logit),
        [torch.randn(2, 5, 500) for _ in range(3)],
    )


@pytest.mark.parametrize("V", [5, 300, 4099])
def test_softmax_of_the_head(V: int) -> None:
    torch.manual_seed(0)
    logits, rows = 4 * torch.randn(7, V), 7
    logits[3, 2] = logits[3, 4] = 20.0  # two largest: the first one counts
    gold = torch.randint(V, (rows,))
    counted = torch.tensor([True, True, False, True, True, False, True])
    found = logits.clone()
    loss = kernels.softmax_into_gradient(found, gold, counted, 1e-2)
    exact = logits.double().requires_grad_()
    targets = torch.where(counted, gold, -100)
    cross_entropy.head_cross_entropy_reference(
        exact, torch.eye(V, dtype=torch.float64), targets, l2wrap=1e-2
    ).backward()
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
    assert abs(float(loss) - float(plain)) < 1e-4
    assert exact.grad is not None
    tie = exact.grad[3, [2, 4]].mean()  # autograd shares between equal maxima
    exact.grad[3, 2] = tie + 0.5 * 1e-2 * 20
    exact.grad[3, 4] = tie - 0.5 * 1e-2 * 20
    assert (found.double() - exact.grad).abs().max() < 1e-6
