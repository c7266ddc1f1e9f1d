"""Batches against slices of the token stream written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkvtune.data.batch import Batch
from rwkvtune.data.lm_dataset import LMDataset, validation_windows
from rwkvtune.data.sampler import PublishedOrder, ShuffledOrder

TOKENS = np.random.default_rng(5).integers(0, 6, size=500).astype(np.uint16)


@pytest.mark.parametrize("order", [PublishedOrder(500, 8), ShuffledOrder(500, 8, seed=2)])
def test_batches_are_the_windows_that_the_order_names(
    order: PublishedOrder | ShuffledOrder,
) -> None:
    batch = LMDataset(TOKENS, order, 8).batch(10, 5, rank=1, world_size=3)
    starts = [order.start(10 + j * 3 + 1) for j in range(5)]
    assert batch.input_ids.tolist() == [TOKENS[s : s + 8].tolist() for s in starts]
    assert batch.targets.tolist() == [TOKENS[s + 1 : s + 9].tolist() for s in starts]
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.reset is None
    assert batch.target_tokens == 40


def test_ranks_together_read_what_one_rank_reads() -> None:
    dataset = LMDataset(TOKENS, ShuffledOrder(500, 8, seed=2), 8)
    alone = dataset.batch(6, 12).input_ids
    ranks = [dataset.batch(6, 4, rank=rank, world_size=3).input_ids for rank in range(3)]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), alone)


def test_reset_is_true_exactly_after_an_end_of_document() -> None:
    order = ShuffledOrder(500, 8, seed=2)
    batch = LMDataset(TOKENS, order, 8, reset_at_documents=True).batch(0, 300)
    assert batch.reset is not None
    assert batch.reset.dtype == torch.bool
    starts = [order.start(j) for j in range(300)]
    assert 0 in starts
    expected = [[s + t == 0 or TOKENS[s + t - 1] == 0 for t in range(8)] for s in starts]
    assert batch.reset.tolist() == expected


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 10, 16, 17, 18, 100])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_validation_windows_meet_every_target_once(
    num_tokens: int, batch_size: int, world_size: int
) -> None:
    tokens = np.arange(1, num_tokens + 1)  # all different, so that a target tells its place
    targets: list[int] = []
    num_batches = set()
    for rank in range(world_size):
        batches = list(
            validation_windows(tokens, 8, batch_size=batch_size, rank=rank, world_size=world_size)
        )
        num_batches.add(len(batches))
        for batch in batches:
            assert batch.input_ids.shape == batch.targets.shape
            assert batch.input_ids.shape[0] in range(1, batch_size + 1)
            assert batch.input_ids.shape[1] == 8
            counted = batch.targets != -100
            assert torch.equal(batch.targets[counted], batch.input_ids[counted] + 1)
            targets += batch.targets[counted].tolist()
    assert sorted(targets) == list(range(2, num_tokens + 1))
    assert len(num_batches) == 1


def test_validation_windows_know_documents_too() -> None:
    batches = list(validation_windows(TOKENS[:20], 8, batch_size=3, reset_at_documents=True))
    assert len(batches) == 1
    assert batches[0].reset is not None
    after_end = [True, *(TOKENS[:19] == 0).tolist()]
    assert batches[0].reset.flatten()[:20].tolist() == after_end
    assert batches[0].target_tokens == 19


def test_fewer_than_two_tokens_give_no_validation() -> None:
    assert list(validation_windows(TOKENS[:1], 8)) == []
    assert list(validation_windows(TOKENS[:0], 8)) == []


def test_a_batch_moves_as_a_whole() -> None:
    batch = Batch(
        torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([[1, -100]]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    moved = batch.to("meta")
    assert moved.reset is not None
    assert {moved.input_ids.device.type, moved.targets.device.type, moved.reset.device.type} == {
        "meta"
    }
    assert batch.target_tokens == 1


def test_ignoring_targets_of_a_lone_row_leaves_its_inputs_alone() -> None:
    tokens = np.arange(1, 7, dtype=np.uint16)  # the second rank gets one window, all of it padding
    for rank in (0, 1):
        for batch in validation_windows(tokens, 4, rank=rank, world_size=2):
            assert batch.input_ids.min() >= 0
            assert batch.input_ids.data_ptr() != batch.targets.data_ptr()
