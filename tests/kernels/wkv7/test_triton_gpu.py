"""The Triton kernels of x070 in the interpreter, against the per-token loop in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkvtune.kernels.wkv7.reference import wkv7_reference
from tests.kernels.interpreted_triton import interpreted
from tests.kernels.wkv7.test_wkv7 import (
    NAMES,
    assert_close,
    make_inputs,
    relative_rms,
    upstream_gradients,
)

kernels = interpreted("rwkvtune.kernels.wkv7.triton_gpu")
shared = interpreted("rwkvtune.kernels.triton_gpu")

EXACT = partial(kernels.wkv7_triton, precision="high")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(
    call: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    state: Tensor,
    dtype: torch.dtype,
    reset: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output, final state and all gradients of a random linear function of both, in fp64."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
    leaves.append(state.to(state_dtype).clone().requires_grad_())
    y, final = call(*leaves, reset=reset)
    dy, dfinal = upstream_gradients(y, final)
    if dtype == torch.float64:
        dy = dy.to(inputs[0].dtype).double()
    gradients = torch.autograd.grad([y, final], leaves, [dy, dfinal])
    return {
        name: x.detach().double() for name, x in zip(NAMES, (y, final, *gradients), strict=True)
    }


@pytest.mark.parametrize(
    ("T", "N", "chunk_len", "keys"),
    [
        (1, 64, 16, "random"),
        (15, 32, 16, "random"),
        (33, 64, 16, "repeated"),
        (40, 32, 32, "random"),
        (70, 32, 64, "repeated"),
        (17, 128, 16, "random"),
    ],
)
def test_values_and_gradients_of_the_loop(T: int, N: int, chunk_len: int, keys: str) -> None:
    inputs, state = make_inputs(1, T, 2, N, keys=keys)
    truth = run(wkv7_reference, inputs, state, torch.float64)
    ours = run(partial(EXACT, chunk_len=chunk_len), inputs, state, torch.float32)
    # fp32 rounding; measured up to 8e-7.
    assert_close(ours, truth, 4e-6)


@pytest.mark.parametrize("raw_decay", [-20.0, 20.0])
def test_the_extremes_of_the_decay(raw_decay: float) -> None:
    inputs, state = make_inputs(1, 64, 1, 32, w=raw_decay, keys="repeated")
    truth = run(wkv7_reference, inputs, state, torch.float64)
    ours = run(partial(EXACT, chunk_len=64), inputs, state, torch.float32)
    # At its ends the sigmoid's slope is below fp32's resolution of the sigmoid itself.
    assert (ours.pop("dw") - truth.pop("dw")).abs().max() < 1e-6
    assert_close(ours, truth, 4e-6)


def test_documents_that_start_inside_chunks() -> None:
    inputs, state = make_inputs(2, 50, 1, 32)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[0, [5, 6, 15, 16, 33]] = True
    reset[1, 0] = True
    truth = run(wkv7_reference, inputs, state, torch.float64, reset)
    assert_close(run(EXACT, inputs, state, torch.float32, reset), truth, 4e-6)


@pytest.mark.parametrize("with_reset", [False, True])
def test_segments_side_by_side_are_the_sequence(
    monkeypatch: pytest.MonkeyPatch, with_reset: bool
) -> None:
    monkeypatch.setattr(shared, "SEGMENT_CHUNKS", 2)
    monkeypatch.setattr(shared, "PROGRAMS_PER_PROCESSOR", 3)
    inputs, state = make_inputs(1, 101, 1, 32)
    reset = torch.zeros(1, 101, dtype=torch.bool)
    reset[0, [40, 77]] = True
    assert shared.Spread(inputs[0], 16).segments == 3
    truth = run(wkv7_reference, inputs, state, torch.float64, reset if with_reset else None)
    ours = run(EXACT, inputs, state, torch.float32, reset if with_reset else None)
    assert_close(ours, truth, 4e-6)


def test_no_grid_has_more_than_cuda_allows() -> None:
    many_rows = shared.Spread(torch.empty(40000, 33, 2, 64, device="meta"), 16)
    long_row = shared.Spread(torch.empty(1, 2**21, 2, 64, device="meta"), 16)
    for spread in (many_rows, long_row):
        for grid in (spread.sequential, spread.parallel):
            # CUDA C++ Programming Guide, technical specifications per compute capability.
            assert grid[0] < 2**31 and all(side <= 65535 for side in grid[1:])


def test_torch_settings_for_fp32_products_are_read_in_old_and_new_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert shared.operands_of(torch.float32, "default") == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert shared.operands_of(torch.float32, "default") == "tf32x3"
    assert shared.operands_of(torch.bfloat16, "default") == "tf32"
    new_words = SimpleNamespace(fp32_precision="tf32")  # the old ones raise an error beside them
    monkeypatch.setattr(torch.backends.cuda, "matmul", new_words)
    assert shared.operands_of(torch.float32, "default") == "tf32"


def test_numbers_of_the_original_recurrence(golden: Path) -> None:
    numbers = {k: v.float() for k, v in load_file(golden / "wkv7-ops.safetensors").items()}
    inputs = [numbers[name] for name in ("r", "w_raw", "k", "v", "a", "b")]
    if inputs[0].shape[-1] not in (32, 64, 128):
        pytest.skip("head size of the golden file is not one of the kernels'")
    y, final = EXACT(*inputs, numbers["s0.state_in"])
    assert relative_rms(y.double(), numbers["s0.y"].double()) < 2e-6
    assert relative_rms(final.double(), numbers["s0.state_out"].double()) < 2e-6


def test_bf16_inputs_keep_their_precision() -> None:
    inputs, state = make_inputs(1, 40, 1, 64)
    inputs = [x.bfloat16() for x in inputs]
    truth = run(wkv7_reference, inputs, state, torch.float64)
    ours = run(kernels.wkv7_triton, inputs, state, torch.bfloat16)
    # The interpreter cuts to bf16 instead of rounding, which alone costs twice the 1.7e-3 of
    # rounding.
    assert_close(ours, truth, 5e-3)
