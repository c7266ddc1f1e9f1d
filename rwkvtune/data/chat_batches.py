"""Which conversations stand in which row of which step, and the batches that come of it.

Two ways to fill rows. Packed: several conversations in a row of ctx_len, the model's state (token
shifts too) set to zero where each begins, which is the same as training them apart. Bucketed: one
conversation a row, those of a step of about one length, so that little is padded.

Each pass over the data visits each conversation once, in an order that depends on the seed and the
number of the pass only. A pass is divided into steps of global_bsz rows; the last step of a pass
may have fewer. Which rank and micro-batch a row goes to changes nothing in the sum of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from rwkvtune.data.batch import IGNORED_TARGET, Batch
from rwkvtune.data.chat_samples import ChatSamples
from rwkvtune.data.sampler import permutation
from rwkvtune.data.tokenizers import END_OF_DOCUMENT

Batching = Literal["packed", "bucketed"]
Row = list[int]
"""Numbers of the samples that stand in it one after the other; an empty row trains nothing."""

LENGTH_STEP = 16
"""Lengths of batches are multiples of this, so that few different ones occur."""


class ChatBatches:
    """Answers which batches step n of a run consists of, for each rank."""

    def __init__(
        self,
        samples: ChatSamples,
        rows: list[Row],
        *,
        batching: Batching,
        global_bsz: int,
        seed: int,
    ) -> None:
        self.samples, self.batching, self.global_bsz, self.seed = (
            samples,
            batching,
            global_bsz,
            seed,
        )
        self.rows = rows
        self.steps_per_pass = -(-len(self.rows) // global_bsz)
        self._pass = lru_cache(2)(self._order)

    def rows_of(self, step: int) -> list[Row]:
        """The global_bsz rows of a step, empty ones last."""
        pass_number, place = divmod(step, self.steps_per_pass)
        chosen = self._pass(pass_number)[place]
        return [self.rows[n] for n in chosen] + [[]] * (self.global_bsz - len(chosen))

    def batches(
        self, step: int, *, micro_bsz: int, accumulate: int, rank: int, world_size: int
    ) -> list[Batch]:
        """The micro-batches of one rank. Neighbouring rows, of one length when bucketed, are one
        micro-batch of all ranks."""
        rows = self.rows_of(step)
        assert len(rows) == micro_bsz * accumulate * world_size, "made for another global batch"
        return [
            batch_of(
                self.samples,
                [rows[(i * micro_bsz + j) * world_size + rank] for j in range(micro_bsz)],
            )
            for i in range(accumulate)
        ]

    def _order(self, pass_number: int) -> list[np.ndarray]:
        """The rows of each step of a pass."""
        order = permutation(len(self.rows), f"{self.seed} rows {pass_number}")
        if self.batching == "packed":
            return [order[i : i + self.global_bsz] for i in range(0, len(order), self.global_bsz)]
        # Shuffled first: those of equal length meet others in each pass.
        by_length = order[np.argsort(self.samples.lengths[order], kind="stable")]
        steps = [
            by_length[i : i + self.global_bsz] for i in range(0, len(by_length), self.global_bsz)
        ]
        return [steps[i] for i in permutation(len(steps), f"{self.seed} steps {pass_number}")]


def rows_for(samples: ChatSamples, *, ctx_len: int, batching: Batching) -> list[Row]:
    if batching == "packed":
        return pack(samples.lengths, ctx_len)
    return [[n] for n in range(len(samples))]


def pack(lengths: Sequence[int] | np.ndarray, ctx_len: int) -> list[Row]:
    """Rows that hold all samples, none longer than ctx_len: each sample, longest first, goes into
    the fullest row that has room for it.

    Best fit decreasing needs at most 11/9 of the fewest rows possible, and 1 (Johnson 1974).
    """
    lengths = np.asarray(lengths)
    rows: list[Row] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit n: some row has room for n more
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        assert 0 < length <= ctx_len, "samples were checked against the context"
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(sample)
        else:
            room, row = ctx_len, len(rows)
            rows.append([sample])
        if left := room - length:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


def batch_of(samples: ChatSamples, rows: Sequence[Row]) -> Batch:
    """[len(rows), T]: inputs, targets, and where the state is set to zero; T as the longest row
    needs it. Behind the samples of a row: END_OF_DOCUMENT with ignored targets."""
    longest = max(int(samples.lengths[row].sum()) for row in rows)
    T = max(-(-longest // LENGTH_STEP), 1) * LENGTH_STEP
    inputs = np.full((len(rows), T), END_OF_DOCUMENT, np.int64)
    targets = np.full((len(rows), T), IGNORED_TARGET, np.int64)
    reset = np.zeros((len(rows), T), bool)
    for i, row in enumerate(rows):
        at = 0
        for sample in row:
            ids, next_ids, trained = samples.shifted(sample)
            part = slice(at, at + len(ids))
            inputs[i, part] = ids
            targets[i, part][trained] = next_ids[trained]
            reset[i, at] = True
            at += len(ids)
    is_packed = any(len(row) > 1 for row in rows)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(reset) if is_packed else None,
    )


def validation_batches(
    samples: ChatSamples,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int = 0,
) -> Iterator[Batch]:
    """Every sample once, one a row, all ranks together; each rank gets as many batches.

    max_rows: use only the first so many samples; 0 = all.
    """
    numbers = np.arange(min(max_rows or len(samples), len(samples)))
    by_length = numbers[np.argsort(samples.lengths[numbers], kind="stable")].tolist()
    for start in range(0, len(by_length), batch_size * world_size):
        mine = by_length[start : start + batch_size * world_size][rank::world_size]
        yield batch_of(samples, [[n] for n in mine] or [[]])
