"""Which backend runs a kernel, and what is printed about it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rwkvtune.errors import UserError
from rwkvtune.kernels import dispatch
from rwkvtune.kernels.wkv7 import wkv7


def test_a_gpu_gets_the_triton_kernel_and_all_else_the_matrix_form_with_a_reason() -> None:
    assert dispatch.choose("wkv7", "cpu", torch.float32, 64) == ("chunked", "no GPU in use")
    on_gpu = partial(dispatch.choose, "wkv7", "cuda", torch.bfloat16, triton_obstacle="")
    assert on_gpu(64) == ("triton_gpu", "GPU")
    assert on_gpu(64, precision="high").backend == "triton_gpu_high"
    assert on_gpu(48) == ("chunked", "head size 48 is not one of 32, 64, 128")
    assert on_gpu(64, triton_obstacle="no triton").backend == "chunked"
    assert dispatch.choose("wkv7", "mps", torch.float32, 64).backend == "chunked"


def test_a_backend_asked_for_by_name_is_taken() -> None:
    assert dispatch.choose("wkv7", "cpu", torch.float32, 64, "reference").backend == "reference"


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match="'fast'.*chunked, reference, triton_gpu"):
        dispatch.choose("wkv7", "cuda", torch.bfloat16, 64, "fast", triton_obstacle="")


def test_a_triton_kernel_asked_for_by_name_where_none_can_run_is_refused_with_the_reason() -> None:
    ask = partial(dispatch.choose, "wkv7", "cuda", requested="triton_gpu")
    with pytest.raises(UserError, match="cannot run here: triton is not installed"):
        ask(torch.bfloat16, 64)
    with pytest.raises(UserError, match="cannot run here: .*float64"):
        ask(torch.float64, 64, triton_obstacle="")


def test_a_machine_without_what_triton_compiles_its_launcher_with_gets_the_matrix_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    ask = partial(dispatch.resolve, "wkv7", "cuda", torch.bfloat16, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    dispatch._obstacle_to_triton.cache_clear()
    assert ask().backend == "chunked" and "no C compiler" in ask().reason
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    dispatch._obstacle_to_triton.cache_clear()
    assert "no Python.h" in ask().reason
    dispatch._obstacle_to_triton.cache_clear()


def test_the_fused_pieces_follow_what_was_asked_for_the_recurrence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_obstacle_to_triton", lambda: "")
    on_gpu = type("OnGPU", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16})()
    assert dispatch.fuses_with_triton(on_gpu)
    assert dispatch.fuses_with_triton(on_gpu, 64, "triton_gpu_high")
    assert not dispatch.fuses_with_triton(on_gpu, 64, "chunked")
    assert not dispatch.fuses_with_triton(on_gpu, 48)
    monkeypatch.setenv(dispatch.KERNEL_VARIABLE, "reference")
    assert not dispatch.fuses_with_triton(on_gpu)
    assert dispatch.fuses_with_triton(on_gpu, 64, "triton_gpu")


def test_the_environment_names_the_backend_only_where_the_caller_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(dispatch.KERNEL_VARIABLE, "reference")
    assert dispatch.resolve("wkv7", "cpu", torch.float32, 64).backend == "reference"
    assert dispatch.resolve("wkv7", "cpu", torch.float32, 64, "chunked").backend == "chunked"
    monkeypatch.setenv(dispatch.KERNEL_VARIABLE, "nothing")
    with pytest.raises(UserError, match=dispatch.KERNEL_VARIABLE):
        dispatch.resolve("wkv7", "cpu", torch.float32, 64)


def test_the_choice_is_printed_once_and_on_rank_zero_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.zeros(1, 1, 1, 32)
    monkeypatch.setattr(dispatch, "_announced", set())
    wkv7(x, x, x, x, x, x)
    wkv7(x, x, x, x, x, x, backend="chunked")
    assert capsys.readouterr().err == "kernel wkv7: chunked (no GPU in use)\n"
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setenv("RANK", "1")
    wkv7(x, x, x, x, x, x)
    assert capsys.readouterr().err == ""
