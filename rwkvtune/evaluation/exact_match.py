"""Whether a model would give exactly the expected answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rwkvtune.data.batch import IGNORED_TARGET, Batch
from rwkvtune.inference.generate import evaluating


def exact_matches(
    model: nn.Module, batches: Iterable[Batch], *, device: torch.device | str
) -> Iterator[bool]:
    """For each row in turn: is every target the likeliest token after the right ones before it?

    That is so exactly when the model, asked for its likeliest answer token by token, writes the
    expected one and nothing else, its end included; a row is one sample (no packing).
    """
    with evaluating(model):
        for batch in batches:
            on_device = batch.to(device)

            def hits(hidden: Tensor, weight: Tensor, targets: Tensor = on_device.targets) -> Tensor:
                """[B, T] bool: right, or nothing to be predicted."""
                likeliest = torch.nn.functional.linear(hidden, weight.to(hidden.dtype)).argmax(-1)
                return (likeliest == targets) | (targets == IGNORED_TARGET)

            right, _ = model(on_device.input_ids, reset=on_device.reset, head=hits)
            yield from right.all(dim=1).tolist()
