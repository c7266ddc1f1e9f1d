"""Leaves that several models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvtune.kernels.calls import without_autocast
from rwkvtune.kernels.working_weights import in_type


class LayerState(NamedTuple):
    """What one block carries from token to token."""

    att_shift: Tensor
    """[B, C], the last token that time mix saw (after ln1)."""
    wkv: Tensor
    """[B, H, N, N] fp32, rows by value channel, columns by key channel."""
    ffn_shift: Tensor
    """[B, C], the last token that channel mix saw (after ln2)."""


State = list[LayerState]
"""One `LayerState` per block."""


def detached(state: State) -> State:
    """The same values without their history."""
    return [LayerState(*(tensor.detach() for tensor in layer)) for layer in state]


Head = Callable[[Tensor, Tensor], Tensor]
"""(hidden [B, T, C], head weight [V, C]) -> what takes the place of the logits, such as a loss."""


def empty(*shape: int) -> nn.Parameter:
    """A parameter without values: a model sets all its values itself, or loads them."""
    return nn.Parameter(torch.empty(shape))


class Linear(nn.Linear):
    """A projection without bias whose fp32 master weight is used in the type of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: a model sets all its values itself, or loads them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, in_type(self.weight, x.dtype))


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, eps 1e-5; reads any float type and writes `dtype`."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with without_autocast(x.device.type):
            z = F.layer_norm(
                x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
            )
        return z if dtype is None else z.to(dtype)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type that matrix products run in: autocast's where it is on, else the weights' own."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
