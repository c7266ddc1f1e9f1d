"""Which conversations stand in which rows of which step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvtune.data.batch import IGNORED_TARGET, Batch
from rwkvtune.data.chat_batches import (
    Batching,
    ChatBatches,
    batch_of,
    pack,
    rows_for,
    validation_batches,
)
from rwkvtune.data.chat_samples import ChatSamples
from rwkvtune.errors import UserError

CTX_LEN = 32


def samples_of(lengths: list[int]) -> ChatSamples:
    """Sample n holds the id n + 1, its first tokens are context."""
    sizes = [length + 1 for length in lengths]
    ids = np.concatenate([np.full(size, n + 1, np.uint32) for n, size in enumerate(sizes)])
    trained = np.concatenate([np.arange(size) >= min(2, size - 1) for size in sizes])
    ends = np.cumsum(sizes, dtype=np.int64)
    names = [str(n) for n in range(len(lengths))]
    return ChatSamples(ids, trained, ends, names)


def made(samples: ChatSamples, batching: Batching, global_bsz: int, seed: int = 1) -> ChatBatches:
    rows = rows_for(samples, ctx_len=CTX_LEN, batching=batching)
    return ChatBatches(samples, rows, batching=batching, global_bsz=global_bsz, seed=seed)


def best_fit(lengths: list[int], room: int) -> list[int]:
    """How full rows become, the slow way: look at every row for every sample, longest first."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, filled in enumerate(rows) if filled + length <= room]
        if fitting:
            rows[max(fitting, key=rows.__getitem__)] += length
        else:
            rows.append(length)
    return sorted(rows)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_packing_puts_each_sample_into_the_fullest_row_with_room(lengths: list[int]) -> None:
    rows = pack(lengths, 40)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[n] for n in row) for row in rows) == best_fit(lengths, 40)


def test_a_packed_row_is_its_samples_one_after_the_other_each_from_a_zero_state() -> None:
    samples = samples_of([3, 4, 2])
    batch = batch_of(samples, [[1, 0], [2]])
    X = IGNORED_TARGET
    padding = [0] * 9, [X] * 9
    assert batch.input_ids.tolist() == [
        [2, 2, 2, 2, 1, 1, 1, *padding[0]], [3, 3, *[0] * 14],
    ]  # fmt: skip
    assert batch.targets.tolist() == [
        [X, 2, 2, 2, X, 1, 1, *padding[1]], [X, 3, *[X] * 14],
    ]  # fmt: skip
    assert batch.reset is not None
    assert batch.reset.nonzero().tolist() == [[0, 0], [0, 4], [1, 0]]


def trained_ids(batches: list[Batch]) -> Counter[int]:
    return Counter(id for b in batches for id in b.targets[b.targets != IGNORED_TARGET].tolist())


LENGTHS = [int(n) for n in np.random.default_rng(3).integers(2, 30, 45)]


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_every_pass_trains_every_sample_once_in_an_order_of_its_own(batching: Batching) -> None:
    samples = samples_of(LENGTHS)
    made_batches = made(samples, batching, 4)
    passes = []
    for first in (0, made_batches.steps_per_pass):
        steps = range(first, first + made_batches.steps_per_pass)
        batches = [
            b
            for step in steps
            for b in made_batches.batches(step, micro_bsz=4, accumulate=1, rank=0, world_size=1)
        ]
        assert trained_ids(batches) == Counter({n + 1: m - 1 for n, m in enumerate(LENGTHS)})
        passes.append([made_batches.rows_of(step) for step in steps])
    assert passes[0] != passes[1]
    again = made(samples, batching, 4)
    assert again.rows_of(5) == made_batches.rows_of(5), "a function of the step alone"
    other_seed = made(samples, batching, 4, seed=2)
    assert [other_seed.rows_of(s) for s in range(3)] != [again.rows_of(s) for s in range(3)]


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_ranks_and_micro_batches_divide_a_step_among_them(batching: Batching) -> None:
    made_batches = made(samples_of(LENGTHS), batching, 8)
    for step in range(made_batches.steps_per_pass):
        alone = made_batches.batches(step, micro_bsz=8, accumulate=1, rank=0, world_size=1)
        divided = [
            b
            for rank in (0, 1)
            for b in made_batches.batches(step, micro_bsz=2, accumulate=2, rank=rank, world_size=2)
        ]
        assert len(divided) == 4 and all(len(b.input_ids) == 2 for b in divided)
        assert trained_ids(divided) == trained_ids(alone)


def test_bucketed_batches_hold_samples_of_about_one_length() -> None:
    lengths = [int(n) for n in np.random.default_rng(4).integers(1, 500, 400)]
    samples = samples_of(lengths)
    rows = rows_for(samples, ctx_len=500, batching="bucketed")
    made_batches = ChatBatches(samples, rows, batching="bucketed", global_bsz=8, seed=1)
    sizes = [
        b.input_ids.numel()
        for step in range(made_batches.steps_per_pass)
        for b in made_batches.batches(step, micro_bsz=8, accumulate=1, rank=0, world_size=1)
    ]
    assert sum(sizes) < 1.15 * sum(lengths)


def test_validation_visits_every_sample_once_and_each_rank_as_many_batches() -> None:
    samples = samples_of(LENGTHS)
    ranks = [
        list(validation_batches(samples, batch_size=4, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    assert len(ranks[0]) == len(ranks[1])
    assert trained_ids(ranks[0] + ranks[1]) == Counter(
        {n + 1: m - 1 for n, m in enumerate(LENGTHS)}
    )


def test_equal_samples_are_held_out_together() -> None:
    samples = samples_of([5, 6, 7, 8] * 5)
    for n in range(4, 20):  # the ids of the first four, five times over
        samples[n][0][:] = samples[n % 4][0]
    training, validation = samples.divided(0.25, seed=1)
    assert len(training) == 15 and len(validation) == 5
    assert not {*training.ids.tolist()} & {*validation.ids.tolist()}
    with pytest.raises(UserError, match="1 samples .1 different ones. cannot be divided"):
        samples.subset([0]).divided(0.1, seed=1)
