"""wkv6, and wkv5 on the same code, against numbers of the original programs, fp64, and their own
separate runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkvtune.errors import UserError
from rwkvtune.kernels.wkv5 import wkv5
from rwkvtune.kernels.wkv6 import chunked, wkv6

BACKENDS = ["reference", "chunked"]
DOORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"wkv5": wkv5, "wkv6": wkv6}
NAMES = ["y", "state", "dr", "dk", "dv", "dw", "du", "dstate"]


def make_inputs(
    kernel: str, B: int, T: int, H: int, N: int, *, w: str = "model", seed: int = 0
) -> list[Tensor]:
    """r, k, v, w, u and an initial state, in fp64.

    w "model": raw decays as models have them; "stress": uniform from -12 to 6, so that decays of
    1 - 6e-6 and of e^-403 stand side by side; a number: that one everywhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v = (normal(B, T, H, N) for _ in range(3))
    of_decays = (H, N) if kernel == "wkv5" else (B, T, H, N)
    if w == "model":
        raw = 2 * normal(*of_decays) - 3
    elif w == "stress":
        raw = torch.rand(*of_decays, generator=generator, dtype=torch.float64) * 18 - 12
    else:
        raw = torch.full(of_decays, float(w), dtype=torch.float64)
    return [r, 0.3 * k, v, raw, normal(H, N), 0.5 * normal(B, H, N, N)]


def upstream_gradients(
    y: Tensor, final: Tensor, dy_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The coefficients of the linear function of output and final state that is differentiated,
    those of the output rounded to dy_dtype."""
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    dy = dy.to(dy_dtype or y.dtype).to(y.dtype)
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final.dtype)
    return dy, dfinal


def run(
    kernel: str,
    inputs: list[Tensor],
    *,
    dtype: torch.dtype,
    reset: Tensor | None = None,
    backend: str = "chunked",
    dy_dtype: torch.dtype | None = None,
    autocast: bool = False,
) -> dict[str, Tensor]:
    """Output, final state and all gradients of a random linear function of both, in fp64."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = [dtype] * 4 + [state_dtype] * 2
    leaves = [
        x.detach().to(d).clone().requires_grad_() for x, d in zip(inputs, dtypes, strict=True)
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, final = DOORS[kernel](*leaves, reset=reset, backend=backend)
    gradients = torch.autograd.grad([y, final], leaves, upstream_gradients(y, final, dy_dtype))
    return {n: x.detach().double() for n, x in zip(NAMES, (y, final, *gradients), strict=True)}


def relative_rms(x: Tensor, truth: Tensor) -> float:
    return ((x - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: relative_rms(found[name], truth[name]) for name in truth}
    assert all(error <= tolerance for error in errors.values()), errors


def loop_in_fp64(
    kernel: str,
    inputs: list[Tensor],
    reset: Tensor | None = None,
    dy_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The recurrence as its definition says, written without our code; gradients by autograd."""
    r, k, v, w, u, state = leaves = [x.detach().clone().requires_grad_() for x in inputs]
    B, T, H, N = r.shape
    S, rows = state, []
    for t in range(T):
        if reset is not None:
            S = torch.where(reset[:, t].view(B, 1, 1, 1), torch.zeros_like(S), S)
        decay = torch.exp(-torch.exp(w if kernel == "wkv5" else w[:, t]))
        vk = torch.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
        rows.append(torch.einsum("bhj,bhij->bhi", r[:, t], S + vk * u[:, None]))
        S = S * decay.unsqueeze(-2) + vk
    y = torch.stack(rows, 1)
    gradients = torch.autograd.grad([y, S], leaves, upstream_gradients(y, S, dy_dtype))
    return {n: x.detach() for n, x in zip(NAMES, (y, S, *gradients), strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", ["", "s0."])
@pytest.mark.parametrize("kernel", DOORS)
def test_numbers_of_the_original_recurrence(
    golden: Path, kernel: str, prefix: str, backend: str
) -> None:
    file = load_file(golden / "wkv56-ops.safetensors")
    numbers = {n.removeprefix(kernel + "."): x.float() for n, x in file.items() if kernel in n}
    r, k, v, w, u = leaves = [numbers[n].requires_grad_() for n in ("r", "k", "v", "w", "u")]
    state = numbers["s0.state_in"].requires_grad_() if prefix else None
    y, final = DOORS[kernel](r, k, v, w, u, state, backend=backend)
    gradients = torch.autograd.grad(y, leaves if state is None else [*leaves, state], numbers["gy"])
    names = ["gr", "gk", "gv", "gw", "gu", "gstate_in"][: len(gradients)]
    checked = 0
    for name, found in zip(["y", "state_out", *names], (y, final, *gradients), strict=True):
        if prefix + name in numbers:
            wanted = numbers[prefix + name].double()
            # fp32 rounding over 37 tokens; measured 3e-7.
            assert relative_rms(found.double(), wanted) < 2e-6, name
            checked += 1
    assert checked == (8 if prefix else 4)


@pytest.mark.parametrize("kernel", DOORS)
def test_gradient_of_the_reference_by_finite_differences(kernel: str) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(kernel, 1, 3, 2, 4)]
    reset = torch.tensor([[False, False, True]])
    call = partial(DOORS[kernel], reset=reset, backend="reference")
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(
    ("T", "B", "N"),
    [(1, 1, 64), (2, 2, 32), (15, 1, 64), (16, 2, 32), (17, 1, 128), (63, 2, 32), (256, 1, 32)],
)
@pytest.mark.parametrize("kernel", DOORS)
def test_chunked_equals_the_definition_in_value_and_gradient(
    kernel: str, T: int, B: int, N: int
) -> None:
    inputs = make_inputs(kernel, B, T, 2, N)
    truth = loop_in_fp64(kernel, inputs)
    # Same formula in fp64 leaves only the algebra; fp32 adds rounding (measured below 8e-7).
    assert_close(run(kernel, inputs, dtype=torch.float64), truth, 1e-12)
    assert_close(run(kernel, inputs, dtype=torch.float32), truth, 3e-6)


@pytest.mark.parametrize("T", [1, 16, 37, 130])
@pytest.mark.parametrize("kernel", DOORS)
def test_decays_near_0_beside_decays_near_1_keep_fp32_accuracy_in_every_element(
    kernel: str, T: int
) -> None:
    inputs = make_inputs(kernel, 1, T, 2, 64, w="stress")
    truth = loop_in_fp64(kernel, inputs)
    found = run(kernel, inputs, dtype=torch.float32)
    assert all(x.isfinite().all() for x in found.values())
    assert_close(found, truth, 3e-6)
    # Raw decays three apart differ by a factor of 20 in the logarithm and so, below 0, in dw: each
    # band must be right by its own size. Above 4.5 a decay is e^-90 and less: dw is 0 next to it.
    w, dw = inputs[3], truth["dw"]
    for low in (-12, -9, -6, -3, 0):
        band = (w >= low) & (w < low + 3)
        if dw[band].any():
            error = (found["dw"] - dw)[band].abs().max()
            assert error < 1e-5 * dw[band].abs().max(), low
    assert (found["dw"] - dw)[w > 4.5].abs().amax() < 1e-12


@pytest.mark.parametrize("w", [-80.0, -12.0, 6.0, 12.0, 80.0, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", DOORS)
def test_decays_at_and_beyond_both_ends_stay_finite_and_right(
    kernel: str, backend: str, w: float
) -> None:
    inputs = make_inputs(kernel, 1, 37, 2, 32, w=str(w))
    # Beyond 88, exp(w) is infinite in fp32, and 0 times it no number: 9 has a decay of 0 already.
    truth = loop_in_fp64(kernel, [*inputs[:3], inputs[3].clamp(max=9.0), *inputs[4:]])
    found = run(kernel, inputs, dtype=torch.float32, backend=backend)
    # Gradients of these decays are zero or next to it: compared in absolute terms.
    scale = truth["dk"].abs().max()
    assert ((found.pop("dw") - truth.pop("dw")).abs() < 1e-6 * scale).all()
    assert_close(found, truth, 3e-6)


@pytest.mark.parametrize("kernel", DOORS)
def test_a_decay_very_near_1_adds_up_over_many_tokens(kernel: str) -> None:
    """As fp32 1 - 6e-6 is 0.5 % off in its distance from 1: a product of such numbers drifts."""
    T = 4096
    inputs = make_inputs(kernel, 1, T, 1, 4, w="-12")
    inputs[1].zero_()  # no keys: the state only decays
    _, final = DOORS[kernel](*(x.float() for x in inputs))
    wanted = inputs[5] * torch.exp(-T * torch.exp(torch.tensor(-12.0, dtype=torch.float64)))
    assert ((final.double() / wanted - 1).abs() < 2e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("starts", [[0], [1], [5, 6, 7], [15, 16, 17], [3, 16, 31, 32, 39]])
@pytest.mark.parametrize("kernel", DOORS)
def test_reset_equals_separate_runs(kernel: str, backend: str, starts: list[int]) -> None:
    T = 40
    inputs = make_inputs(kernel, 1, T, 2, 32)
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[0, starts] = True
    together = run(kernel, inputs, dtype=torch.float64, reset=reset, backend=backend)

    bounds = sorted({0, *starts, T})
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        r, k, v = (x[:, start:stop] for x in leaves[:3])
        w = leaves[3] if kernel == "wkv5" else leaves[3][:, start:stop]
        entering = None if start in starts else leaves[5]
        y, final = DOORS[kernel](r, k, v, w, leaves[4], entering, backend=backend)
        outputs.append(y)
    apart_y = torch.cat(outputs, dim=1)
    gradients = torch.autograd.grad(
        [apart_y, final], leaves, upstream_gradients(apart_y, final),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    apart = dict(zip(NAMES, (apart_y, final, *gradients), strict=True))
    for name in NAMES:
        torch.testing.assert_close(together[name], apart[name].detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("w", ["model", "stress"])
@pytest.mark.parametrize("kernel", DOORS)
def test_every_sequence_of_a_batch_resets_at_its_own_places(kernel: str, w: str) -> None:
    B, T = 3, 70
    inputs = make_inputs(kernel, B, T, 2, 32, w=w)
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.1
    truth = loop_in_fp64(kernel, inputs, reset)
    assert_close(run(kernel, inputs, dtype=torch.float64, reset=reset), truth, 1e-12)
    assert_close(run(kernel, inputs, dtype=torch.float32, reset=reset), truth, 3e-6)
    assert_close(
        run(kernel, inputs, dtype=torch.float64, reset=reset, backend="reference"), truth, 1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 16, 21])
@pytest.mark.parametrize("kernel", DOORS)
def test_two_halves_with_the_state_passed_on_equal_the_whole(
    kernel: str, backend: str, cut: int
) -> None:
    inputs = make_inputs(kernel, 2, 37, 2, 32)
    whole = run(kernel, inputs, dtype=torch.float64, backend=backend)
    r, k, v, w, u, state = leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = []
    for part in (slice(None, cut), slice(cut, None)):
        some_w = w if kernel == "wkv5" else w[:, part]
        y, state = DOORS[kernel](
            r[:, part], k[:, part], v[:, part], some_w, u, state, backend=backend
        )
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    gradients = torch.autograd.grad([y, state], leaves, upstream_gradients(y, state))
    for name, found in zip(NAMES, (y, state, *gradients), strict=True):
        torch.testing.assert_close(found.detach(), whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", DOORS)
def test_one_token_repeated_keeps_fp32_accuracy(kernel: str) -> None:
    r, k, v, w, u, state = make_inputs(kernel, 1, 1, 2, 64)
    r, k, v = (x.expand(1, 256, 2, 64) for x in (r, k, v))
    w = w if kernel == "wkv5" else w.expand(1, 256, 2, 64)
    truth = loop_in_fp64(kernel, [r, k, v, w, u, state])
    assert_close(run(kernel, [r, k, v, w, u, state], dtype=torch.float32), truth, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", DOORS)
def test_short_inputs_lose_only_their_own_rounding(kernel: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(kernel, 2, 130, 2, 64)
    rounded = [x.to(dtype).double() for x in inputs[:4]] + inputs[4:]
    truth = loop_in_fp64(kernel, rounded, dy_dtype=dtype)
    found = run(kernel, rounded, dtype=dtype)
    # All is computed in fp32; rounding the results to 8 bits costs 2^-9 / sqrt(3) to 2^-9.
    assert_close(found, truth, 2.5e-3)


@pytest.mark.parametrize("kernel", DOORS)
def test_results_have_the_dtypes_of_their_inputs_and_w_may_have_its_own(kernel: str) -> None:
    inputs = make_inputs(kernel, 1, 20, 1, 32)[:5]
    dtypes = [torch.bfloat16] * 3 + [torch.float32, torch.float16]
    leaves = [x.to(d).requires_grad_() for x, d in zip(inputs, dtypes, strict=True)]
    y, final = DOORS[kernel](*leaves)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    y.sum().backward()
    assert [None if x.grad is None else x.grad.dtype for x in leaves] == dtypes


@pytest.mark.parametrize("kernel", DOORS)
def test_inputs_that_need_no_gradient_get_none_and_change_nothing(kernel: str) -> None:
    inputs = make_inputs(kernel, 1, 33, 2, 32)
    whole = run(kernel, inputs, dtype=torch.float64)
    for wanted in range(6):
        leaves = [x.detach().clone() for x in inputs]
        leaves[wanted].requires_grad_()
        y, final = DOORS[kernel](*leaves, backend="chunked")
        outputs = [x for x in (y, final) if x.requires_grad]
        coefficients = [
            c for x, c in zip((y, final), upstream_gradients(y, final), strict=True)
            if x.requires_grad
        ]  # fmt: skip
        (gradient,) = torch.autograd.grad(outputs, [leaves[wanted]], coefficients)
        assert torch.equal(gradient, whole[NAMES[2 + wanted]])


@pytest.mark.parametrize("T", [1, 2, 3, 40])
@pytest.mark.parametrize("kernel", DOORS)
def test_generation_without_gradients_equals_training(kernel: str, T: int) -> None:
    inputs = make_inputs(kernel, 2, T, 2, 32, w="stress")
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[1, -1] = True
    state = inputs[5].clone()
    for documents in (None, reset):
        truth = run(kernel, inputs, dtype=torch.float64, reset=documents)
        with torch.no_grad():
            y, final = DOORS[kernel](*inputs, reset=documents)
        torch.testing.assert_close(y, truth["y"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(final, truth["state"], rtol=1e-12, atol=1e-12)
    assert torch.equal(inputs[5], state)


@pytest.mark.parametrize("kernel", DOORS)
def test_the_size_of_slabs_and_chunks_does_not_change_the_result(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(kernel, 5, 75, 3, 32)
    reset = torch.zeros(5, 75, dtype=torch.bool)
    reset[1, 40] = reset[4, 2] = True
    whole = run(kernel, inputs, dtype=torch.float64, reset=reset)
    # Two rows of the batch and four chunks at a time, with a row and eleven tokens left over.
    rows = 2 * 3 * 4 * chunked.CHUNK_LEN
    monkeypatch.setattr(chunked, "SLAB_ROWS_PER_THREAD", rows // torch.get_num_threads())
    assert_close(run(kernel, inputs, dtype=torch.float64, reset=reset), whole, 1e-13)
    for chunk_len in (1, 8, 64):
        monkeypatch.setattr(chunked, "CHUNK_LEN", chunk_len)
        assert_close(run(kernel, inputs, dtype=torch.float64, reset=reset), whole, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", DOORS)
def test_autocast_does_not_reach_the_recurrence(kernel: str, backend: str) -> None:
    inputs = make_inputs(kernel, 1, 40, 2, 32)
    outside = run(kernel, inputs, dtype=torch.float32, backend=backend)
    inside = run(kernel, inputs, dtype=torch.float32, backend=backend, autocast=True)
    assert all(torch.equal(inside[name], outside[name]) for name in NAMES)


@pytest.mark.parametrize("kernel", DOORS)
def test_strided_inputs_give_the_same_numbers(kernel: str) -> None:
    inputs = make_inputs(kernel, 2, 37, 2, 32)
    plain = run(kernel, inputs, dtype=torch.float64)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    y, _ = DOORS[kernel](*strided, backend="chunked")
    torch.testing.assert_close(y.detach(), plain["y"], rtol=1e-12, atol=1e-12)
    y.sum().backward()  # an expanded gradient, stride zero everywhere
    assert all(x.grad is not None and x.grad.isfinite().all() for x in strided)


@pytest.mark.parametrize("kernel", DOORS)
def test_memory_kept_for_the_backward_is_linear_in_the_length(kernel: str) -> None:
    def kept_bytes(T: int) -> int:
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        leaves = [x.float().requires_grad_() for x in make_inputs(kernel, 1, T, 1, 32)]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            DOORS[kernel](*leaves, backend="chunked")
        return total

    assert kept_bytes(4096) < 2.01 * kept_bytes(2048)


def test_arguments_that_do_not_fit_are_refused_with_both_sides_named() -> None:
    r, k, v, w, u, state = make_inputs("wkv6", 1, 4, 2, 32)
    calls: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: wkv6(r, k, v[:, :3], w, u),
            r"wkv6: r, k, v must .*v is \(1, 3, 2, 32\).*r is \(1, 4, 2, 32\)",
        ),
        (lambda: wkv6(r, k.float(), v, w, u), r"k is .*float32.*r is .*float64"),
        (lambda: wkv6(*(x.int() for x in (r, k, v, w, u))), r"must be float32, .*torch.int32"),
        (lambda: wkv6(r, k, v, w[0, 0], u), r"wkv6: w must be \(1, 4, 2, 32\).*got \(2, 32\)"),
        (lambda: wkv5(r, k, v, w, u), r"wkv5: w must be \(2, 32\).*got \(1, 4, 2, 32\)"),
        (lambda: wkv6(r, k, v, w, u[:1]), r"wkv6: u must be \(2, 32\).*got \(1, 32\)"),
        (lambda: wkv6(r, k, v, w.int(), u), r"wkv6: w must be .*float.*got .*int32"),
        (lambda: wkv6(r, k, v, w, u, state.float()), r"state must be .*float64.*float32"),
        (
            lambda: wkv5(r, k, v, w[0, 0], u, reset=torch.zeros(4, dtype=torch.bool)),
            r"wkv5: reset must be \(1, 4\) torch.bool.*got \(4,\)",
        ),
        (
            lambda: wkv6(r, k, v, w, u, backend="triton_gpu"),
            "wkv6 backend 'triton_gpu' cannot run here: ",
        ),
    ]
    for call, message in calls:
        with pytest.raises(UserError, match=message):
            call()
