"""Which backend runs a kernel, and what is printed about it."""

from __future__ import annotations

import pytest
import torch

from rwkvtune.errors import UserError
from rwkvtune.kernels import dispatch
from rwkvtune.kernels.wkv7 import wkv7


def test_the_matrix_form_is_chosen_everywhere_with_a_reason() -> None:
    assert dispatch.choose("wkv7", "cpu", torch.float32, 64) == ("chunked", "no GPU in use")
    on_gpu = dispatch.choose("wkv7", "cuda", torch.bfloat16, 64, triton_available=True)
    assert on_gpu.backend == "chunked"
    assert "no cuda kernel of its own" in on_gpu.reason


def test_a_backend_asked_for_by_name_is_taken() -> None:
    assert dispatch.choose("wkv7", "cpu", torch.float32, 64, "reference").backend == "reference"


@pytest.mark.parametrize("name", ["triton_gpu", "fast"])
def test_a_backend_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'.*chunked, reference or 'auto'"):
        dispatch.choose("wkv7", "cuda", torch.bfloat16, 64, name, triton_available=True)


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
    wkv7(x, x, x, x, x, x)
    assert capsys.readouterr().err == "kernel wkv7: chunked (no GPU in use)\n"
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setenv("RANK", "1")
    wkv7(x, x, x, x, x, x)
    assert capsys.readouterr().err == ""
