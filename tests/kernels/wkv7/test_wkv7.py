"""wkv7 against numbers of the original program, fp64, and its own separate runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkvtune.kernels.wkv7 import wkv7

BACKENDS = ["reference", "chunked"]
NAMES = ["y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate"]


def make_inputs(
    B: int, T: int, H: int, N: int, *, keys: str = "random", w: float | None = None, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """r, w, k, v, a, b and an initial state with the sizes that a model produces, in fp64.

    keys "repeated": one token over and over, with its gate near 1, the hard case of the inverse.
    w: one raw decay everywhere instead of random ones; -20 keeps all, +20 forgets fastest.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v, kk, raw_w, gate = (normal(B, T, H, N) for _ in range(6))
    gate = torch.sigmoid(gate)
    if keys == "repeated":
        kk = kk[:, :1].expand(B, T, H, N)
        gate = torch.full_like(gate, 0.999)
    raw_w = 2 * raw_w - 1 if w is None else torch.full_like(raw_w, w)
    kk = torch.nn.functional.normalize(kk, dim=-1)
    return [r, raw_w, 0.3 * k, v, -kk, kk * gate], 0.5 * normal(B, H, N, N)


def run(
    backend: str,
    inputs: list[Tensor],
    state: Tensor,
    *,
    dtype: torch.dtype,
    reset: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output, final state and all gradients of a random linear function of both, in fp64."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    leaves.append(state.to(state_dtype).requires_grad_())
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    r, w, k, v, a, b, s0 = leaves
    y, final = wkv7(r, w, k, v, a, b, s0, reset=reset, backend=backend)
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final.dtype)
    gradients = torch.autograd.grad([y, final], leaves, [dy, dfinal])
    return {
        name: x.detach().double() for name, x in zip(NAMES, (y, final, *gradients), strict=True)
    }


def relative_rms(x: Tensor, truth: Tensor) -> float:
    return ((x - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: relative_rms(found[name], truth[name]) for name in truth}
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", ["", "s0."])
def test_numbers_of_the_original_recurrence(golden: Path, backend: str, prefix: str) -> None:
    numbers = {k: v.float() for k, v in load_file(golden / "wkv7-ops.safetensors").items()}
    leaves = [numbers[name].requires_grad_() for name in ("r", "w_raw", "k", "v", "a", "b")]
    r, w, k, v, a, b = leaves
    state = numbers["s0.state_in"].requires_grad_() if prefix else None
    y, final = wkv7(r, w, k, v, a, b, state, backend=backend)
    wanted = leaves if state is None else [*leaves, state]
    gradients = torch.autograd.grad(y, wanted, numbers["gy"])
    names = ["gr", "gw_raw", "gk", "gv", "ga", "gb", "gstate_in"][: len(wanted)]
    for name, found in zip(["y", "state_out", *names], (y, final, *gradients), strict=True):
        # fp32 rounding over 37 tokens; measured 4e-7.
        assert relative_rms(found.double(), numbers[prefix + name].double()) < 2e-6, name


def test_gradient_of_the_reference_by_finite_differences() -> None:
    inputs, state = make_inputs(1, 3, 2, 4)
    reset = torch.tensor([[False, False, True]])
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    call = partial(wkv7, reset=reset, backend="reference")
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 256])
@pytest.mark.parametrize(("B", "N"), [(1, 64), (2, 32), (1, 128)])
def test_chunked_equals_the_reference_in_value_and_gradient(B: int, T: int, N: int) -> None:
    inputs, state = make_inputs(B, T, 2, N)
    truth = run("reference", inputs, state, dtype=torch.float64)
    # Same formula in fp64 leaves only the algebra; fp32 adds rounding (measured below 7e-7).
    assert_close(run("chunked", inputs, state, dtype=torch.float64), truth, 1e-12)
    assert_close(run("chunked", inputs, state, dtype=torch.float32), truth, 3e-6)
