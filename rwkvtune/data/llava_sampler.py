"""Orders of samples that put like beside like: one modality, or one length, in each batch.

All are permutations of the whole data set. Source: LLaVA-NeXT's trainer; its `_auto` mode dropped
the last mixed batches, which are kept here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.utils.data import Sampler

Grouping = Literal["none", "length", "modality_length", "modality_length_auto", "varlen"]


class GroupedSampler(Sampler[int]):
    """Indices of one epoch after another, a function of (seed, epoch).

    lengths: of the samples; for the modality groupings negative where a sample is text.
    batch_size: samples of a batch of one device; world_size: devices times accumulated batches.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        grouping: Grouping,
        *,
        batch_size: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.lengths, self.grouping = lengths, grouping
        self.batch_size, self.world_size, self.seed = batch_size, world_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.grouping == "none":
            return iter(torch.randperm(len(self), generator=generator).tolist())
        size = self.batch_size * self.world_size
        if self.grouping.startswith("modality_length"):
            return iter(by_modality(self.lengths, size, self.world_size, generator))
        lengths = [abs(n) for n in self.lengths]
        if self.grouping == "varlen":
            return iter(by_length_throughout(lengths, size, generator))
        return iter(_flat(mega_batches(lengths, size, self.world_size, generator)))


def mega_batches(
    lengths: Sequence[int], size: int, world_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Random groups of `size` indices, each sorted by length, longest first, and dealt so that each
    device gets about the same length. The last group may be smaller."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [
        _dealt(sorted(group, key=lambda i: -lengths[i]), lengths, world_size) for group in groups
    ]


def by_modality(
    lengths: Sequence[int], size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Batches of one modality in random order; the last group of each modality, which may not fill
    a batch, comes at the end."""
    groups: list[list[int]] = []
    rest: list[int] = []
    for sign in (1, -1):
        indices = [i for i, n in enumerate(lengths) if n * sign > 0]
        own = mega_batches([abs(lengths[i]) for i in indices], size, world_size, generator)
        chosen = [[indices[i] for i in group] for group in own]
        if len(indices) == len(lengths):  # a single modality has nothing to keep apart
            return _flat(chosen)
        groups += chosen[:-1]
        rest += chosen[-1] if chosen else []
    order = torch.randperm(len(groups), generator=generator).tolist()
    return _flat([groups[i] for i in order]) + rest


def by_length_throughout(
    lengths: Sequence[int], size: int, generator: torch.Generator
) -> list[int]:
    """All samples sorted by length, cut into batches; batches and samples within one shuffled."""
    tie = torch.randperm(len(lengths), generator=generator).tolist()
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], tie[i]))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    return _flat([sorted(groups[i], key=lambda j: tie[j]) for i in shuffled])


def _dealt(group: list[int], lengths: Sequence[int], world_size: int) -> list[int]:
    """`group`, longest first, dealt to the device with the least so far; device after device."""
    if world_size == 1 or len(group) % world_size:
        return group
    share = len(group) // world_size
    hands: list[list[int]] = [[] for _ in range(world_size)]
    totals = [0.0] * world_size
    for index in group:
        device = min(range(world_size), key=lambda d: totals[d])
        hands[device].append(index)
        totals[device] += lengths[index]
        if len(hands[device]) == share:
            totals[device] = float("inf")
    return _flat(hands)


def _flat(groups: Sequence[Sequence[int]]) -> list[int]:
    return [index for group in groups for index in group]
