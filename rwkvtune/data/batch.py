"""What a dataset hands to a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    continues: bool = False
    """The rows go on where those of the batch before ended."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            None if self.reset is None else self.reset.to(device, non_blocking=True),
            self.continues,
        )

    def stretch(self, index: int, count: int) -> Batch:
        """Stretch number `index` of `count` equal ones along T: what a rank of a split sequence
        gets. A T that is no multiple of count is padded with ignored targets."""
        if count == 1:
            return self
        T = self.input_ids.shape[1]
        length = -(-T // count)

        def own(x: Tensor, padding: int) -> Tensor:
            padded = F.pad(x, (0, length * count - T), value=padding)
            return padded[:, index * length : (index + 1) * length].contiguous()

        return Batch(
            own(self.input_ids, 0),
            own(self.targets, IGNORED_TARGET),
            None if self.reset is None else own(self.reset, 0),
        )

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU copies from while the CPU goes on."""
        return Batch(
            self.input_ids.pin_memory(),
            self.targets.pin_memory(),
            None if self.reset is None else self.reset.pin_memory(),
            self.continues,
        )

    def chunks(self, length: int) -> list[Batch]:
        """The rows cut into pieces of `length` tokens, each going on from the one before; 0 = one
        piece."""
        T = self.input_ids.shape[1]
        starts = range(0, T, length or T)
        cuts = [slice(start, start + (length or T)) for start in starts]
        return [
            Batch(
                self.input_ids[:, cut],
                self.targets[:, cut],
                None if self.reset is None else self.reset[:, cut],
                self.continues or cut.start > 0,
            )
            for cut in cuts
        ]

    @property
    def counts(self) -> tuple[int, int, int]:
        """(rows, tokens, tokens of pictures)."""
        return len(self.input_ids), self.input_ids.numel(), 0

    @property
    def target_tokens(self) -> int:
        """Number of targets that count. On a GPU this waits: ask before moving the batch there."""
        return int((self.targets != IGNORED_TARGET).sum())
