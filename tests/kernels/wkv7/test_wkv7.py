"""wkv7 against numbers of the original program, fp64, and its own separate runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkvtune.errors import UserError
from rwkvtune.kernels.wkv7 import chunked, wkv7

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


def upstream_gradients(y: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of the linear function of output and final state that is differentiated."""
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final.dtype)
    return dy, dfinal


def run(
    backend: str,
    inputs: list[Tensor],
    state: Tensor,
    *,
    dtype: torch.dtype,
    reset: Tensor | None = None,
    dy_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output, final state and all gradients of a random linear function of both, in fp64."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    leaves.append(state.to(state_dtype).requires_grad_())
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    r, w, k, v, a, b, s0 = leaves
    y, final = wkv7(r, w, k, v, a, b, s0, reset=reset, backend=backend)
    dy, dfinal = upstream_gradients(y, final)
    dy = dy if dy_dtype is None else dy.to(dy_dtype).to(y.dtype)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("starts", [[0], [1], [5, 6, 7], [15, 16, 17], [3, 16, 31, 32, 39]])
def test_reset_equals_separate_runs(backend: str, starts: list[int]) -> None:
    T = 40
    inputs, state = make_inputs(1, T, 2, 32)
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[0, starts] = True
    together = run(backend, inputs, state, dtype=torch.float64, reset=reset)

    bounds = sorted({0, *starts, T})
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    outputs = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        r, w, k, v, a, b = (x[:, start:stop] for x in leaves[:6])
        entering = None if start in starts else leaves[6]
        y, final = wkv7(r, w, k, v, a, b, entering, backend=backend)
        outputs.append(y)
    apart_y = torch.cat(outputs, dim=1)
    dy, dfinal = upstream_gradients(apart_y, final)
    gradients = torch.autograd.grad(
        [apart_y, final], leaves, [dy, dfinal], allow_unused=True, materialize_grads=True
    )
    apart = dict(zip(NAMES, (apart_y, final, *gradients), strict=True))
    for name in NAMES:
        torch.testing.assert_close(together[name], apart[name].detach(), rtol=1e-10, atol=1e-10)


def test_every_sequence_of_a_batch_resets_at_its_own_places() -> None:
    B, T = 3, 70
    inputs, state = make_inputs(B, T, 2, 32)
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.1
    truth = run("reference", inputs, state, dtype=torch.float64, reset=reset)
    assert_close(run("chunked", inputs, state, dtype=torch.float64, reset=reset), truth, 1e-12)
    assert_close(run("chunked", inputs, state, dtype=torch.float32, reset=reset), truth, 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 16, 21])
def test_two_halves_with_the_state_passed_on_equal_the_whole(backend: str, cut: int) -> None:
    inputs, state = make_inputs(2, 37, 2, 32)
    whole = run(backend, inputs, state, dtype=torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    r, w, k, v, a, b = (x[:, :cut] for x in leaves[:6])
    first, middle = wkv7(r, w, k, v, a, b, leaves[6], backend=backend)
    r, w, k, v, a, b = (x[:, cut:] for x in leaves[:6])
    second, final = wkv7(r, w, k, v, a, b, middle, backend=backend)
    y = torch.cat([first, second], dim=1)
    gradients = torch.autograd.grad([y, final], leaves, upstream_gradients(y, final))
    for name, found in zip(NAMES, (y, final, *gradients), strict=True):
        torch.testing.assert_close(found.detach(), whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("w", [None, -9.0])
def test_one_token_repeated_keeps_fp32_accuracy(w: float | None) -> None:
    # Powers of Aab reach 1e8 within 32 such tokens: an inverse by repeated squaring fails here.
    inputs, state = make_inputs(1, 256, 2, 64, keys="repeated", w=w)
    truth = run("reference", inputs, state, dtype=torch.float64)
    # The loop itself loses 4e-6 in fp32, the matrix form 1.3e-6.
    assert_close(run("chunked", inputs, state, dtype=torch.float32), truth, 5e-6)


@pytest.mark.parametrize("w", [-80.0, -20.0, 20.0, 80.0])
def test_decays_at_both_extremes_stay_finite_and_right(w: float) -> None:
    inputs, state = make_inputs(1, 100, 2, 64, w=w)
    truth = run("reference", inputs, state, dtype=torch.float64)
    found = run("chunked", inputs, state, dtype=torch.float32)
    # The gradient of a saturated sigmoid is zero or next to it: compared in absolute terms.
    scale = truth["dk"].abs().max()
    assert ((found.pop("dw") - truth.pop("dw")).abs() < 1e-6 * scale).all()
    assert_close(found, truth, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", ["random", "repeated"])
def test_short_inputs_lose_only_their_own_rounding(keys: str, dtype: torch.dtype) -> None:
    inputs, state = make_inputs(2, 130, 2, 64, keys=keys)
    rounded = [x.to(dtype).double() for x in inputs]
    truth = run("reference", rounded, state, dtype=torch.float64, dy_dtype=dtype)
    found = run("chunked", rounded, state, dtype=dtype)
    # All is computed in fp32; rounding the results to 8 bits costs 2^-9 / sqrt(3) to 2^-9.
    assert_close(found, truth, 2.5e-3)


def test_results_have_the_dtypes_of_their_inputs() -> None:
    inputs, _ = make_inputs(1, 20, 1, 32)
    leaves = [x.to(torch.bfloat16).requires_grad_() for x in inputs]
    r, w, k, v, a, b = leaves
    y, final = wkv7(r, w, k, v, a, b)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    y.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in leaves)


def test_inputs_that_need_no_gradient_get_none_and_change_nothing() -> None:
    inputs, state = make_inputs(1, 33, 2, 32)
    whole = run("chunked", inputs, state, dtype=torch.float64)
    for wanted in range(7):
        leaves = [x.detach().clone() for x in (*inputs, state)]
        leaves[wanted].requires_grad_()
        r, w, k, v, a, b, s0 = leaves
        y, final = wkv7(r, w, k, v, a, b, s0, backend="chunked")
        (gradient,) = torch.autograd.grad(
            [y, final], [leaves[wanted]], upstream_gradients(y, final)
        )
        assert torch.equal(gradient, whole[NAMES[2 + wanted]])


@pytest.mark.parametrize("T", [1, 2, 3, 40])
@pytest.mark.parametrize("start", [None, 0, 1])
def test_generation_without_gradients_equals_training(T: int, start: int | None) -> None:
    inputs, state = make_inputs(2, T, 2, 32)
    reset = None
    if start is not None:
        reset = torch.zeros(2, T, dtype=torch.bool)
        reset[1, start:] = True
    truth = run("chunked", inputs, state, dtype=torch.float64, reset=reset)
    before = state.clone()
    with torch.no_grad():
        r, w, k, v, a, b = inputs
        y, final = wkv7(r, w, k, v, a, b, state, reset=reset)
    torch.testing.assert_close(y, truth["y"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, truth["state"], rtol=1e-12, atol=1e-12)
    assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_without_gradients_from_no_state_is_the_reference(dtype: torch.dtype) -> None:
    r, w, k, v, a, b = (x.to(dtype) for x in make_inputs(2, 1, 2, 32)[0])
    truth, truth_state = wkv7(r, w, k, v, a, b, backend="reference")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = wkv7(r, w, k, v, a, b)
    assert y.dtype == dtype and final.dtype == torch.float32
    # Sums in another order: fp32's last digits, and one rounding of the output in bf16.
    torch.testing.assert_close(final, truth_state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, truth, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_the_size_of_slabs_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, state = make_inputs(5, 75, 3, 32)
    reset = torch.zeros(5, 75, dtype=torch.bool)
    reset[1, 40] = reset[4, 2] = True
    whole = run("chunked", inputs, state, dtype=torch.float64, reset=reset)
    # Two rows of the batch and one chunk at a time, with a row and eleven tokens left over.
    rows = 2 * 3 * chunked.CHUNK_LEN
    monkeypatch.setattr(chunked, "SLAB_ROWS_PER_THREAD", rows // torch.get_num_threads())
    small = run("chunked", inputs, state, dtype=torch.float64, reset=reset)
    assert_close(small, whole, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_recurrence(backend: str) -> None:
    inputs, state = make_inputs(1, 40, 2, 32)
    outside = run(backend, inputs, state, dtype=torch.float32)
    leaves = [x.detach().float().requires_grad_() for x in (*inputs, state)]
    r, w, k, v, a, b, s0 = leaves
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = wkv7(r, w, k, v, a, b, s0, backend=backend)
    gradients = torch.autograd.grad([y, final], leaves, upstream_gradients(y, final))
    for name, inside in zip(NAMES, (y, final, *gradients), strict=True):
        assert torch.equal(inside.detach().double(), outside[name]), name


def test_strided_inputs_give_the_same_numbers() -> None:
    inputs, state = make_inputs(2, 37, 2, 32)
    plain = run("chunked", inputs, state, dtype=torch.float64)
    r, w, k, v, a, b = (
        x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in inputs
    )
    y, _ = wkv7(r, w, k, v, a, b, state, backend="chunked")
    torch.testing.assert_close(y.detach(), plain["y"], rtol=1e-12, atol=1e-12)
    y.sum().backward()  # an expanded gradient, stride zero everywhere
    assert r.grad is not None and r.grad.isfinite().all()


def test_memory_kept_for_the_backward_is_linear_in_the_length() -> None:
    def kept_bytes(T: int) -> int:
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        inputs, _ = make_inputs(1, T, 1, 32)
        r, w, k, v, a, b = (x.float().requires_grad_() for x in inputs)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            wkv7(r, w, k, v, a, b, backend="chunked")
        return total

    assert kept_bytes(4096) < 2.01 * kept_bytes(2048)


def test_arguments_that_do_not_fit_are_refused_with_both_sides_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, state = make_inputs(1, 4, 2, 32)
    r, w, k, v, a, b = inputs
    with pytest.raises(UserError, match=r"v is \(1, 3, 2, 32\).*r is \(1, 4, 2, 32\)"):
        wkv7(r, w, k, v[:, :3], a, b)
    with pytest.raises(UserError, match=r"k is .*float32.*r is .*float64"):
        wkv7(r, w, k.float(), v, a, b)
    with pytest.raises(UserError, match=r"must be float32, .*; got torch.int32"):
        wkv7(*(x.int() for x in inputs))
    with pytest.raises(UserError, match=r"r must be \[B, T, H, N\].*got \(1, 0, 2, 32\)"):
        wkv7(*(x[:, :0] for x in inputs))
    with pytest.raises(UserError, match=r"state must be \(1, 2, 32, 32\) torch.float64.*float32"):
        wkv7(r, w, k, v, a, b, state.float())
    with pytest.raises(UserError, match=r"reset must be \(1, 4\) torch.bool.*got \(4,\)"):
        wkv7(r, w, k, v, a, b, reset=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(UserError, match="backend 'triton_gpu' cannot run here: "):
        wkv7(r, w, k, v, a, b, backend="triton_gpu")
