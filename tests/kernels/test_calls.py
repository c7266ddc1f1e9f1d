"""What is left out where gradients or autocast are off changes no bit of the result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvtune.kernels.calls import without_autocast
from rwkvtune.kernels.fused.time_mix import (
    norm_bonus_gate,
    norm_gate,
    prepare_keys,
    squared_relu,
)
from rwkvtune.kernels.fused.token_shift import blend, shift_difference, token_shift_mix

B, T, H, N = 2, 3, 2, 16
C = H * N


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


z, heads = random(B, T, C), random(B, T, H, N)
PIECES: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
    "token_shift_mix": lambda: token_shift_mix(z, random(6, C), random(B, C)),
    "prepare_keys": lambda: prepare_keys(z, z, random(C), random(C), N),
    "norm_bonus_gate": lambda: norm_bonus_gate(
        heads, heads, heads, heads, z, random(H, N), random(C), random(C), 1e-5
    ),
    "norm_gate": lambda: norm_gate(heads, z, random(C), random(C), 1e-5),
    "shift_difference": lambda: shift_difference(z, random(B, C)),
    "blend": lambda: blend(z, random(B, T, C), random(5, B, T, C)),
    "squared_relu": lambda: squared_relu(z),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_without_gradients_the_numbers_are_those_of_training(name: str, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = as_tuple(PIECES[name]())
        with torch.no_grad():
            generated = as_tuple(PIECES[name]())
    assert len(trained) == len(generated)
    for a, b in zip(trained, generated, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_autocast_is_off_inside_and_as_before_outside() -> None:
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with without_autocast("cpu"):
                assert (z @ z.mT).dtype == torch.float32
            assert (z @ z.mT).dtype == (torch.bfloat16 if enabled else torch.float32)
