"""The Triton kernels of x060 and x052 in the interpreter, against the per-token loop in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rwkvtune.kernels.wkv6.reference import wkv6_reference
from tests.kernels.interpreted_triton import interpreted
from tests.kernels.wkv6.test_wkv6 import NAMES, make_inputs, upstream_gradients
from tests.kernels.wkv7.test_wkv7 import assert_close

kernels = interpreted("rwkvtune.kernels.wkv6.triton_gpu")
shared = interpreted("rwkvtune.kernels.triton_gpu")

EXACT = partial(kernels.wkv6_triton, precision="high")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(
    call: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    dtype: torch.dtype,
    reset: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output, final state and all gradients of a random linear function of both, in fp64."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = [dtype] * 3 + [state_dtype] * 3
    leaves = [x.to(d).clone().requires_grad_() for x, d in zip(inputs, dtypes, strict=True)]
    y, final = call(*leaves, reset=reset)
    dy, dfinal = upstream_gradients(y, final, inputs[0].dtype)
    gradients = torch.autograd.grad([y, final], leaves, [dy, dfinal])
    return {n: x.detach().double() for n, x in zip(NAMES, (y, final, *gradients), strict=True)}


@pytest.mark.parametrize("kernel", ["wkv5", "wkv6"])
@pytest.mark.parametrize(
    ("T", "N", "w"),
    [(1, 32, "model"), (15, 64, "stress"), (33, 32, "stress"), (20, 128, "model")]
    + [(17, 32, value) for value in ("-12", "0", "6")],
)
def test_values_and_gradients_of_the_loop(kernel: str, T: int, N: int, w: str) -> None:
    inputs = make_inputs(kernel, 1, T, 2, N, w=w)
    truth = run(wkv6_reference, inputs, torch.float64)
    ours = run(EXACT, inputs, torch.float32)
    if w == "6":  # decays of 1e-175 and their gradients are 0 in fp32
        assert truth.pop("dw").abs().max() < 1e-100
        assert not ours["dw"].any()
    # fp32 rounding; measured up to 4e-7.
    assert_close(ours, truth, 4e-6)


@pytest.mark.parametrize("kernel", ["wkv5", "wkv6"])
def test_documents_that_start_inside_chunks(kernel: str) -> None:
    inputs = make_inputs(kernel, 2, 50, 1, 32)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[0, [5, 6, 15, 16, 33]] = True
    reset[1, 0] = True
    truth = run(wkv6_reference, inputs, torch.float64, reset)
    assert_close(run(EXACT, inputs, torch.float32, reset), truth, 4e-6)


def test_segments_side_by_side_are_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "SEGMENT_CHUNKS", 2)
    monkeypatch.setattr(shared, "PROGRAMS_PER_PROCESSOR", 3)
    inputs = make_inputs("wkv6", 1, 101, 1, 32)
    assert shared.Spread(inputs[0], 16).segments == 3
    reset = torch.zeros(1, 101, dtype=torch.bool)
    reset[0, 77] = True
    truth = run(wkv6_reference, inputs, torch.float64, reset)
    assert_close(run(EXACT, inputs, torch.float32, reset), truth, 4e-6)


def test_bf16_inputs_keep_their_precision() -> None:
    inputs = [x.bfloat16() for x in make_inputs("wkv6", 1, 40, 1, 64)]
    truth = run(wkv6_reference, inputs, torch.float64)
    # The interpreter cuts to bf16 instead of rounding, which alone costs twice the 1.7e-3 of
    # rounding.
    assert_close(run(kernels.wkv6_triton, inputs, torch.bfloat16), truth, 5e-3)
