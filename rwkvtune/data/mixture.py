"""Several token files read as one, in exact proportions."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from rwkvtune.data.batch import Batch
from rwkvtune.data.binidx import binidx_prefix
from rwkvtune.data.lm_dataset import LMDataset, Place, sample_numbers, windows
from rwkvtune.errors import UserError

LONGEST_CYCLE = 1_000_000


@dataclass(frozen=True)
class Source:
    """One part of `a:0.7,b:0.3`."""

    prefix: str
    """Of a pair of token files."""
    weight: Fraction | None
    """As it was written; None where only the prefix was."""


def parse_sources(text: str) -> list[Source]:
    """`a:0.7,b:0.3`, `a,b` or `a` -> its sources.

    A name without a weight may hold a colon, and one whose files exist may hold commas too.
    UserError when only some have weights, one is not above 0, or one file is named twice.
    """
    if os.path.exists(binidx_prefix(text) + ".idx"):
        return [Source(binidx_prefix(text), None)]
    sources = [_source(part.strip()) for part in text.split(",")]
    if not all(source.prefix for source in sources):
        raise UserError(f"{text!r} names no token file between two commas: expected a:0.7,b:0.3")
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(source.prefix for source in sources if source.weight is None)
        raise UserError(f"{text!r}: {bare} has no weight: give all a weight, such as a:0.7,b:0.3")
    prefixes = [source.prefix for source in sources]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(f"{text!r} names {prefix} twice: give it once, with the whole weight")
    return sources


def _source(part: str) -> Source:
    prefix, colon, written = part.rpartition(":")
    if not colon:
        return Source(binidx_prefix(part), None)
    try:
        weight = Fraction(written)
    except (ValueError, ZeroDivisionError):
        return Source(binidx_prefix(part), None)  # a colon inside a path
    if weight <= 0:
        raise UserError(f"{part!r}: a weight must be above 0; leave out what is not to be read")
    return Source(binidx_prefix(prefix), weight)


class Interleaving:
    """Which source each sample comes from, as a pure function of its number.

    The order repeats after as few samples as hold each source exactly its share of times: 10 for
    7 : 3. Inside, occurrence i of a source with count c stands where (i + 0.5) / c sorts it, which
    spreads every source evenly.
    UserError when that cycle would be longer than a million samples.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        shares = [weight / sum(weights) for weight in weights]
        self.cycle = math.lcm(*(share.denominator for share in shares))
        if self.cycle > LONGEST_CYCLE:
            raise UserError(
                f"weights {', '.join(str(float(w)) for w in weights)} repeat only after "
                f"{self.cycle} samples: give them at most six digits together"
            )
        counts = [int(share * self.cycle) for share in shares]
        due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
        which = np.repeat(np.arange(len(counts)), counts)
        self._source = which[np.argsort(due, kind="stable")]
        self._before = np.zeros(self.cycle, dtype=np.int64)
        for number, count in enumerate(counts):
            self._before[self._source == number] = np.arange(count)
        self._counts = counts

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the source, how many samples it gave before)."""
        cycles, place = divmod(int(sample), self.cycle)
        source = int(self._source[place])
        return source, cycles * self._counts[source] + int(self._before[place])


class MixedDataset:
    """Samples of several datasets of one ctx_len; each is read in its own order."""

    def __init__(self, parts: Sequence[LMDataset], weights: Sequence[Fraction]) -> None:
        self.parts = parts
        self.ctx_len, self.reset_at_documents = parts[0].ctx_len, parts[0].reset_at_documents
        self.shares = [float(weight / sum(weights)) for weight in weights]
        """Of each part, together 1."""
        self._interleaving = Interleaving(weights)

    @property
    def num_slots(self) -> int:
        """Windows of all parts together: as long as one pass over all of them."""
        return sum(part.num_slots for part in self.parts)

    def place(self, sample: int) -> Place:
        source, own_sample = self._interleaving.locate(sample)
        return self.parts[source].place(own_sample)

    def batch(self, first_sample: int, count: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """[count, ctx_len]; as LMDataset.batch."""
        numbers = sample_numbers(first_sample, count, rank, world_size)
        return windows([self.place(n) for n in numbers], self.ctx_len, self.reset_at_documents)
