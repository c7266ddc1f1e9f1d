"""Batches for language models from one stream of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rwkvtune.data.batch import IGNORED_TARGET, Batch
from rwkvtune.data.sampler import SampleOrder
from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT

Place = tuple[np.ndarray, int]
"""Tokens, and where among them a window starts."""


class LMDataset:
    """Answers which tokens samples number n, n + 1, ... of a run consist of, for each rank.

    tokens: [num_tokens], any integer dtype, may be on the disk (BinIdx.tokens).
    reset_at_documents: batches say where documents start, so that nothing is carried over an
    end-of-document token.
    """

    def __init__(
        self, tokens: np.ndarray, order: SampleOrder, ctx_len: int, reset_at_documents: bool = False
    ) -> None:
        assert (order.num_tokens, order.ctx_len) == (len(tokens), ctx_len), (
            "order made for other data"
        )
        self.tokens = tokens
        self.order = order
        self.ctx_len = ctx_len
        self.reset_at_documents = reset_at_documents

    @property
    def num_slots(self) -> int:
        """Samples in one pass over the data."""
        return self.order.num_slots

    def place(self, sample: int) -> Place:
        start = self.order.start(sample)
        assert start + self.ctx_len < len(self.tokens), "windows lie inside the data"
        return self.tokens, start

    def batch(self, first_sample: int, count: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """[count, ctx_len]: samples first_sample + j * world_size + rank for j = 0 .. count-1."""
        numbers = sample_numbers(first_sample, count, rank, world_size)
        return windows([self.place(n) for n in numbers], self.ctx_len, self.reset_at_documents)


def sample_numbers(first_sample: int, count: int, rank: int, world_size: int) -> range:
    """The samples of one rank: every world_size-th from first_sample + rank on."""
    return range(first_sample + rank, first_sample + rank + count * world_size, world_size)


def validation_windows(
    tokens: np.ndarray,
    ctx_len: int,
    *,
    batch_size: int = 1,
    reset_at_documents: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Consecutive windows in which each of tokens[1:] is a target exactly once, all ranks together.

    Each window starts from nothing, so its first targets are predicted from little context. The
    last window is padded: end-of-document inputs with ignored targets. Every rank gets the same
    number of batches (sharded models need that), so a rank that runs out of windows gets a row of
    ignored targets: add up losses and target_tokens, then divide once.
    Yields nothing for fewer than two tokens.
    """
    num_windows = -(-(len(tokens) - 1) // ctx_len)
    for batch_start in range(0, num_windows, batch_size * world_size):
        first = batch_start + rank * batch_size
        rows = range(first, max(first + 1, min(first + batch_size, num_windows)))
        starts = [row * ctx_len for row in rows]
        places = [(tokens, start) for start in starts]
        batch = windows(places, ctx_len, reset_at_documents)
        of_targets = torch.tensor(starts)[:, None] + torch.arange(1, ctx_len + 1)
        batch.targets[of_targets >= len(tokens)] = IGNORED_TARGET
        yield batch


def windows(places: Sequence[Place], ctx_len: int, reset_at_documents: bool) -> Batch:
    """[len(places), ctx_len] from each place on; END_OF_DOCUMENT beyond the data."""
    # Column 0 is the token before the window; it says whether a document starts at its first input.
    rows = np.full((len(places), ctx_len + 2), END_OF_DOCUMENT, dtype=np.int64)
    for row, (tokens, start) in zip(rows, places, strict=True):
        before = min(start, 1)
        piece = tokens[start - before : start + ctx_len + 1]
        row[1 - before : 1 - before + len(piece)] = piece
    ids = torch.from_numpy(rows)
    reset = (ids[:, :-2] == END_OF_DOCUMENT) if reset_at_documents else None
    # A copy: of a single row, inputs and targets would otherwise share their memory.
    return Batch(ids[:, 1:-1].contiguous(), ids[:, 2:].clone(), reset)
