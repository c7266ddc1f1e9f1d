"""The mixes with the previous token against their formulas, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvtune.kernels.fused.token_shift import (
    blend,
    shift_difference,
    token_shift_mix,
    token_shift_mix_reference,
)

SIZES = [(1, 1, 4, 1), (1, 1, 4, 6), (2, 2, 8, 6), (3, 17, 8, 6), (2, 40, 32, 1), (1, 7, 5, 2)]


def make_inputs(B: int, T: int, C: int, S: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, mix, before in fp64, and reset with documents at random places."""
    generator = torch.Generator().manual_seed(B + T + C + S)
    z, mix, before = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((B, T, C), (S, C), (B, C))
    )
    return z, mix, before, torch.rand(B, T, generator=generator) < 0.3


def by_hand(z: Tensor, mix: Tensor, before: Tensor | None, reset: Tensor | None) -> list[Tensor]:
    """One token at a time."""
    outputs = []
    for row in mix:
        out = torch.empty_like(z)
        for b in range(z.shape[0]):
            for t in range(z.shape[1]):
                last = torch.zeros_like(row) if before is None else before[b]
                if t > 0:
                    last = z[b, t - 1]
                if reset is not None and reset[b, t]:
                    last = torch.zeros_like(row)
                out[b, t] = z[b, t] + (last - z[b, t]) * row
        outputs.append(out)
    return outputs


def outputs_and_gradients(
    function: object, inputs: list[Tensor | None], reset: Tensor | None
) -> list[Tensor]:
    """The blends, then the gradients of a random linear function of them, in fp64."""
    assert callable(function)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, reset)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], weights)
    return [x.detach().double() for x in (*outputs, *gradients)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_before", [False, True])
def test_the_reference_is_the_formula_token_by_token(
    size: tuple[int, int, int, int], with_reset: bool, with_before: bool
) -> None:
    z, mix, before, reset = make_inputs(*size)
    args = (z, mix, before if with_before else None, reset if with_reset else None)
    for found, wanted in zip(token_shift_mix_reference(*args), by_hand(*args), strict=True):
        assert (found - wanted).abs().max() < 1e-14


# Rounding of one product and one sum in fp32; gradients of mix add up B x T such. They are summed
# in fp32 for fp64 input too. In bf16 a number is off by 2**-9 of itself, and three are added.
TOLERANCES = [(torch.float64, 2e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_before", [False, True])
def test_values_and_gradients_equal_the_reference_in_fp64(
    dtype: torch.dtype,
    tolerance: float,
    size: tuple[int, int, int, int],
    with_reset: bool,
    with_before: bool,
) -> None:
    z, mix, before, reset = make_inputs(*size)
    documents = reset if with_reset else None
    given = [z.to(dtype), mix.to(dtype), before.to(dtype) if with_before else None]
    exact = [None if x is None else x.double() for x in given]
    found = outputs_and_gradients(token_shift_mix, given, documents)
    wanted = outputs_and_gradients(token_shift_mix_reference, exact, documents)
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        assert (f - w).abs().max() <= tolerance * max(1.0, float(w.abs().max()))


def test_outputs_have_the_type_of_z_and_gradients_that_of_their_input() -> None:
    z, mix, before, _ = make_inputs(2, 9, 8, 6)
    rounded = z.bfloat16().requires_grad_()
    master, last = mix.float().requires_grad_(), before.float().requires_grad_()
    outputs = token_shift_mix(rounded, master, last)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    gradients = torch.autograd.grad([y.float().sum() for y in outputs], [rounded, master, last])
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_a_gradient_for_one_input_alone_is_the_same(needed: int) -> None:
    z, mix, before, reset = make_inputs(2, 9, 8, 6)

    def gradient(leaves: list[int]) -> Tensor:
        inputs = [x.clone().requires_grad_(i in leaves) for i, x in enumerate((z, mix, before))]
        outputs = token_shift_mix(inputs[0], inputs[1], inputs[2], reset)
        torch.autograd.backward([(y * y).sum() for y in outputs])
        found = inputs[needed].grad
        assert found is not None
        return found

    assert torch.equal(gradient([needed]), gradient([0, 1, 2]))


def test_an_unused_blend_and_a_transposed_input_change_nothing() -> None:
    z, mix, before, reset = make_inputs(3, 9, 8, 6)
    strided = z.transpose(0, 1).contiguous().transpose(0, 1)
    gradients = []
    for function in (token_shift_mix, token_shift_mix_reference):
        leaf = strided.clone(memory_format=torch.preserve_format).requires_grad_()
        assert not leaf.is_contiguous()
        outputs = function(leaf, mix, before, reset)
        gradients.append(torch.autograd.grad((outputs[2] * outputs[4]).sum(), leaf)[0])
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


def test_inputs_are_not_changed() -> None:
    z, mix, before, reset = make_inputs(2, 9, 8, 6)
    kept = [x.clone() for x in (z, mix, before, reset)]
    leaves = [x.requires_grad_() for x in (z, mix, before)]
    torch.stack(token_shift_mix(z, mix, before, reset)).square().sum().backward()
    assert all(x.grad is not None for x in leaves)
    assert all(torch.equal(x, k) for x, k in zip((z, mix, before, reset), kept, strict=True))


def blended(
    z: Tensor, mix: Tensor, before: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, ...]:
    """Both steps of x060's mix; its first one reads the difference too."""
    d = shift_difference(z, before, reset)
    return d, *blend(z, d, mix)


def blended_by_formula(
    z: Tensor, mix: Tensor, before: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, ...]:
    first = torch.zeros_like(z[:, 0]) if before is None else before.to(z.dtype)
    last = torch.cat([first[:, None], z[:, :-1]], dim=1)
    if reset is not None:
        last = torch.where(reset[:, :, None], torch.zeros_like(last), last)
    return last - z, *(z + (last - z) * share for share in mix)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_before", [False, True])
def test_mixes_that_differ_from_token_to_token_equal_their_formula_in_fp64(
    dtype: torch.dtype,
    tolerance: float,
    size: tuple[int, int, int, int],
    with_reset: bool,
    with_before: bool,
) -> None:
    z, mix, before, reset = make_inputs(*size)
    generator = torch.Generator().manual_seed(5)
    mix = mix[:, None, None] + torch.randn(len(mix), *z.shape, generator=generator)
    documents = reset if with_reset else None
    given = [z.to(dtype), mix.to(dtype), before.to(dtype) if with_before else None]
    exact = [None if x is None else x.double() for x in given]
    found = outputs_and_gradients(blended, given, documents)
    wanted = outputs_and_gradients(blended_by_formula, exact, documents)
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        assert (f - w).abs().max() <= tolerance * max(1.0, float(w.abs().max()))
