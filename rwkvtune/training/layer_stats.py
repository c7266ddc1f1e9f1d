"""What each block of a model does while it trains: how large its gradients are, how fast it
forgets."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from rwkvtune.checkpoint import whole
from rwkvtune.training.fabric import unwrapped

_PART_OF_BLOCK = re.compile(r"\bblocks\.(\d+)\.(att|ffn)\.")
_PARTS = ("att", "ffn")


@torch.no_grad()
def layer_statistics(fabric: Any, model: nn.Module) -> list[dict[str, float]]:
    """Per block, first to last, the columns of layers.csv but step and layer.

    att_grad_norm, ffn_grad_norm: norm over all gradients that this part of the block has now, of
    all ranks; left out where it has none.
    decay_min, decay_mean, decay_max: over the channels of what the model's `decay_of_layers()`
    gives; left out where it has no such method.
    A collective call when the model is sharded. Waits once for the device.
    """
    inner = unwrapped(model)
    places: list[int] = []
    gradients: list[Any] = []
    num_layers = 0
    for name, parameter in inner.named_parameters():
        if not (found := _PART_OF_BLOCK.search(name)):
            continue
        num_layers = max(num_layers, int(found[1]) + 1)
        if parameter.grad is not None:
            places.append(len(_PARTS) * int(found[1]) + _PARTS.index(found[2]))
            gradients.append(parameter.grad)
    norms = _norms_by_place(fabric, gradients, places, len(_PARTS) * num_layers)
    decays = [whole(decay) for decay in getattr(inner, "decay_of_layers", list)()]
    ranges = [torch.stack([d.min(), d.mean(), d.max()]) for d in decays]
    values = torch.cat([norms, *ranges]).tolist()

    rows: list[dict[str, float]] = [{} for _ in range(num_layers)]
    for place in set(places):
        rows[place // len(_PARTS)][f"{_PARTS[place % len(_PARTS)]}_grad_norm"] = values[place]
    names = ("decay_min", "decay_mean", "decay_max")
    for layer in range(len(decays)):
        first = len(norms) + len(names) * layer
        rows[layer] |= zip(names, values[first : first + len(names)], strict=True)
    return rows


def _norms_by_place(
    fabric: Any, gradients: list[Any], places: list[int], num_places: int
) -> Tensor:
    """fp32 [num_places]: the norm of all gradients of one place together, 0 without any."""
    squares = torch.zeros(num_places, device=fabric.device)
    if not gradients:
        return squares
    is_sharded = hasattr(gradients[0], "to_local")
    own = [g.to_local() if is_sharded else g for g in gradients]
    norms = torch.stack([n.float() for n in torch._foreach_norm(own)])
    squares.index_add_(0, torch.tensor(places, device=fabric.device), norms.square())
    if is_sharded:
        squares = fabric.all_reduce(squares, reduce_op="sum")
    return squares.sqrt()
