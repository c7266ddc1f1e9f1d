"""What a dataset hands to a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_TARGET = -100
"""Target that takes no part in the loss; the number torch's cross entropy ignores by default."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with the tokens to be predicted."""

    input_ids: Tensor
    """[B, T] int64."""

    targets: Tensor
    """[B, T] int64: the token after each input; IGNORED_TARGET where nothing is to be predicted."""

    reset: Tensor | None = None
    """[B, T] bool: True where a document starts and the model forgets all before; None: never."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            None if self.reset is None else self.reset.to(device, non_blocking=True),
        )

    @property
    def target_tokens(self) -> int:
        """Number of targets that count. On a GPU this waits: ask before moving the batch there."""
        return int((self.targets != IGNORED_TARGET).sum())
