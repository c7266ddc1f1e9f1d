"""head_cross_entropy against the original program, a closed form in fp64, and its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy, head_cross_entropy_reference


def make_inputs(
    B: int, T: int, C: int, V: int, *, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B,T,C], weight [V,C] in fp64, targets [B,T] of which some are ignored."""
    generator = torch.Generator().manual_seed(B + T + C + V)
    hidden = scale * torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < 0.3] = -100
    targets[0, 0] = V - 1
    return hidden, weight, targets


def closed_form(
    hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, d/d hidden and d/d weight, written out in fp64, one position at a time."""
    x, weight = hidden.double().flatten(0, -2), weight.double()
    loss = torch.zeros((), dtype=torch.float64)
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    for i, target in enumerate(targets.flatten().tolist()):
        if target == -100:
            continue
        logits = weight @ x[i]
        dlogits = torch.softmax(logits, dim=0)
        loss -= dlogits[target].log()
        dlogits[target] -= 1
        first = int((logits == logits.max()).nonzero()[0])
        dlogits[first] += l2wrap * logits.max()
        dx[i] = weight.T @ dlogits
        dweight += torch.outer(dlogits, x[i])
    return loss, dx.view_as(hidden), dweight


def loss_and_gradients(
    function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = function(x, w, targets, **options)
    dx, dw = torch.autograd.grad(loss, [x, w])
    assert loss.dtype == torch.float32 and dx.dtype == x.dtype and dw.dtype == w.dtype
    return loss.detach(), dx, dw


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    """Errors, each over the largest value of its tensor."""
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        assert (f.double() - w.double()).abs().max() <= tolerance * w.abs().max()


def test_the_gradient_of_logits_equals_the_original_programs(golden: Path) -> None:
    file = load_file(golden / "x070-small.safetensors")
    identity = torch.eye(31)  # makes hidden the logits
    count = file["targets"].numel()
    for l2wrap, name in ((0.0, "dlogits"), (1e-4, "dlogits_l2wrap")):
        loss, dlogits, _ = loss_and_gradients(
            head_cross_entropy, file["logits"], identity, file["targets"], l2wrap=l2wrap
        )
        assert abs(loss / count - file["loss"]).max() < 2e-6
        assert (dlogits / count - file[name]).abs().max() < 1e-8
    assert (file["dlogits"] - file["dlogits_l2wrap"]).abs().max() > 1e-6


SIZES = [(1, 1, 4, 2), (1, 1, 8, 31), (2, 15, 8, 31), (3, 17, 16, 5)]


@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize("size", SIZES)
def test_the_reference_equals_the_closed_form(
    size: tuple[int, int, int, int], l2wrap: float
) -> None:
    inputs = make_inputs(*size)
    # Softmax and sum are fp32 for fp64 input too.
    found = loss_and_gradients(head_cross_entropy_reference, *inputs, l2wrap=l2wrap)
    check(found, closed_form(*inputs, l2wrap), 2e-6)


@pytest.mark.parametrize("chunk_rows", [0, 1, 7, 1000])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bf16: logits and their gradients are off by up to 2**-9 of themselves.
    [(torch.float64, 2e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
)
def test_loss_and_gradients_equal_the_closed_form(
    size: tuple[int, int, int, int],
    l2wrap: float,
    chunk_rows: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    hidden, weight, targets = make_inputs(*size)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    wanted = closed_form(hidden, weight, targets, l2wrap)
    options = {"l2wrap": l2wrap, "chunk_rows": chunk_rows}
    found = loss_and_gradients(head_cross_entropy, hidden, weight, targets, **options)
    check(found, wanted, tolerance)
    reference = loss_and_gradients(
        head_cross_entropy_reference, hidden, weight, targets, l2wrap=l2wrap
    )
    check(found, reference, tolerance)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_vocabulary_too_large_for_one_block_of_the_softmax_changes_nothing(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (rows, 40_000))
    targets = torch.randint(40_000, (rows,), generator=generator)
    found = loss_and_gradients(head_cross_entropy, hidden, weight, targets)
    # The matrix product adds 40000 terms in fp32: by itself it is off by 6e-5.
    check(found, closed_form(hidden, weight, targets, 1e-4), 1e-4)


def test_bf16_hidden_with_fp32_master_weight_gives_an_fp32_weight_gradient() -> None:
    hidden, weight, targets = make_inputs(2, 15, 8, 31)
    rounded, master = hidden.bfloat16(), weight.float()
    found = loss_and_gradients(head_cross_entropy, rounded, master, targets)
    check(found, closed_form(rounded, master.bfloat16(), targets, 1e-4), 2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_and_gradients(head_cross_entropy, rounded, master, targets)
        unrounded = loss_and_gradients(head_cross_entropy, hidden.float(), master, targets)
    assert all(torch.equal(f, i) for f, i in zip(found, inside, strict=True))
    check(unrounded, closed_form(hidden, weight, targets, 1e-4), 2e-6)


def test_of_equal_largest_logits_the_first_is_pulled() -> None:
    hidden = torch.zeros(1, 3, 6)
    hidden[0, 0] = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, -1.0])
    hidden[0, 1] = 2.0
    hidden[0, 2] = torch.tensor([-3.0, -4.0, -2.0, -5.0, -2.0, -3.0])
    targets = torch.tensor([[5, 0, 1]])
    plain = loss_and_gradients(head_cross_entropy, hidden, torch.eye(6), targets, l2wrap=0.0)
    pulled = loss_and_gradients(head_cross_entropy, hidden, torch.eye(6), targets, l2wrap=0.5)
    assert torch.equal(plain[0], pulled[0]), "L2Wrap is in the gradient only"
    wanted = torch.zeros(1, 3, 6)
    wanted[0, 0, 1], wanted[0, 1, 0], wanted[0, 2, 2] = 0.5 * 3.0, 0.5 * 2.0, 0.5 * -2.0
    assert (pulled[1] - plain[1] - wanted).abs().max() < 1e-6


def test_ignored_positions_count_for_nothing_whatever_they_hold() -> None:
    hidden, weight, targets = make_inputs(2, 15, 8, 31)
    other = hidden.clone()
    other[targets == -100] = 50.0
    first = loss_and_gradients(head_cross_entropy, hidden.float(), weight.float(), targets)
    second = loss_and_gradients(head_cross_entropy, other.float(), weight.float(), targets)
    check(second, first, 1e-6)
    assert not second[1][targets == -100].any()
    own = loss_and_gradients(
        head_cross_entropy, hidden.float(), weight.float(), targets.where(targets >= 0, 3),
        ignore_index=3,
    )  # fmt: skip
    check(own, closed_form(hidden, weight, targets.where(targets != 3, -100), 1e-4), 2e-6)


def test_all_positions_ignored_give_zero_and_zero_gradients() -> None:
    hidden, weight, targets = make_inputs(2, 5, 8, 31)
    found = loss_and_gradients(head_cross_entropy, hidden, weight, torch.full_like(targets, -100))
    assert not any(x.any() for x in found)


def test_logits_of_a_thousand_neither_overflow_nor_lose_the_loss() -> None:
    inputs = make_inputs(2, 15, 8, 31, scale=400.0)
    assert (inputs[0] @ inputs[1].T).abs().max() > 1000
    check(loss_and_gradients(head_cross_entropy, *inputs), closed_form(*inputs, 1e-4), 1e-5)


def test_gradients_scale_with_the_incoming_gradient() -> None:
    hidden, weight, targets = make_inputs(2, 15, 8, 31)
    _, dx, dw = loss_and_gradients(head_cross_entropy, hidden.float(), weight.float(), targets)
    x, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    (-0.25 * head_cross_entropy(x, w, targets)).backward()
    assert x.grad is not None and w.grad is not None
    assert torch.equal(x.grad, -0.25 * dx) and torch.equal(w.grad, -0.25 * dw)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_the_same(
    needs: tuple[bool, bool],
) -> None:
    hidden, weight, targets = make_inputs(2, 15, 8, 31)
    loss, dx, dw = loss_and_gradients(head_cross_entropy, hidden, weight, targets, chunk_rows=7)
    leaves = [
        x.clone().requires_grad_(need) for x, need in zip((hidden, weight), needs, strict=True)
    ]
    found = head_cross_entropy(leaves[0], leaves[1], targets, chunk_rows=7)
    assert torch.equal(found, loss) and found.requires_grad == any(needs)
    if any(needs):
        found.backward()
    for leaf, need, wanted in zip(leaves, needs, (dx, dw), strict=True):
        if need:
            assert leaf.grad is not None and torch.equal(leaf.grad, wanted)
        else:
            assert leaf.grad is None


def test_inputs_are_not_changed() -> None:
    inputs = [x.float() if x.is_floating_point() else x for x in make_inputs(2, 15, 8, 31)]
    kept = [x.clone() for x in inputs]
    loss_and_gradients(head_cross_entropy, *inputs)
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize(("function", "most"), [("fused", 8 * 500), ("reference", 64 * 500)])
def test_only_the_asked_for_rows_of_logits_exist_at_once(function: str, most: int) -> None:
    hidden, weight, targets = make_inputs(2, 32, 4, 500)
    x, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with LargestTensor() as largest:
        if function == "fused":
            head_cross_entropy(x, w, targets, chunk_rows=8).backward()
        else:
            head_cross_entropy_reference(x, w, targets).backward()
    assert largest.elements == most
