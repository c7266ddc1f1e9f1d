"""Mixtures: proportions counted, places against the parts' own orders, and what cannot be mixed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvtune.data.binidx import BinIdxWriter
from rwkvtune.data.lm_dataset import LMDataset
from rwkvtune.data.mixture import Interleaving, MixedDataset, Source, parse_sources
from rwkvtune.data.sampler import PublishedOrder, SampleOrder, ShuffledOrder
from rwkvtune.errors import UserError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**12))
def test_every_cycle_has_exactly_the_shares_and_every_start_of_one_nearly(
    weights: list[int], first_cycle: int
) -> None:
    mixed = Interleaving([Fraction(w, 7) for w in weights])
    total = sum(weights)
    assert total % mixed.cycle == 0
    start = first_cycle * mixed.cycle
    seen = [first_cycle * mixed.cycle * w // total for w in weights]
    for n in range(start, start + 2 * mixed.cycle):
        source, before = mixed.locate(n)
        assert before == seen[source], "a sample of this source was skipped or comes twice"
        seen[source] += 1
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count - (n + 1) * Fraction(weight, total)) <= len(weights) / 2
        if (n + 1) % mixed.cycle == 0:
            assert [c * total for c in seen] == [(n + 1) * w for w in weights]


def test_seven_to_three_counted_by_hand() -> None:
    mixed = Interleaving([Fraction("0.7"), Fraction("0.3")])
    assert mixed.cycle == 10
    sources = [mixed.locate(n)[0] for n in range(1000)]
    assert sources.count(0) == 700
    assert [sources[i : i + 10].count(1) for i in range(0, 1000, 10)] == [3] * 100


def test_weights_with_too_many_digits_are_refused() -> None:
    with pytest.raises(UserError, match="at most six digits"):
        Interleaving([Fraction("0.12345678"), Fraction("0.87654321")])
    assert Interleaving([Fraction("0.999999"), Fraction("0.000001")]).cycle == 10**6


def test_batches_hold_each_source_in_its_own_order_and_ranks_share_them_out() -> None:
    tokens = [np.arange(1, 400), np.arange(1001, 1200)]
    orders: list[SampleOrder] = [PublishedOrder(399, 8), ShuffledOrder(199, 8, seed=4)]
    parts = [LMDataset(t, o, 8) for t, o in zip(tokens, orders, strict=True)]
    mixed = MixedDataset(parts, [Fraction(2), Fraction(1)])
    assert mixed.num_slots == orders[0].num_slots + orders[1].num_slots
    rows = mixed.batch(0, 90).input_ids
    for source, order in enumerate(orders):
        own = rows[(rows[:, 0] > 1000) == bool(source)]
        assert len(own) == (60, 30)[source]
        assert own.tolist() == [
            tokens[source][order.start(i) : order.start(i) + 8].tolist() for i in range(len(own))
        ]
    ranks = [mixed.batch(30, 20, rank=rank, world_size=3) for rank in range(3)]
    together = torch.stack([batch.input_ids for batch in ranks], dim=1).flatten(0, 1)
    assert torch.equal(together, rows[30:])


def test_names_weights_and_what_is_neither(tmp_path: Path) -> None:
    assert parse_sources("a:0.7, b.bin:0.3") == [
        Source("a", Fraction(7, 10)),
        Source("b", Fraction(3, 10)),
    ]
    assert parse_sources("data/a") == [Source("data/a", None)]
    assert parse_sources("C:/data/a") == [Source("C:/data/a", None)]
    assert parse_sources("C:/a:2,b:1") == [Source("C:/a", Fraction(2)), Source("b", Fraction(1))]
    odd = tmp_path / "x,y:2"
    with BinIdxWriter(odd, 10) as writer:
        writer.add_document([1, 2])
    assert parse_sources(str(odd)) == [Source(str(odd), None)]
    assert parse_sources(f"{odd}.bin") == [Source(str(odd), None)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a:0.7,b", "b has no weight"),
        ("a:0,b:1", "'a:0': a weight must be above 0"),
        ("a:-1,b:1", "must be above 0"),
        ("a:1,a:2", "names a twice"),
        ("a:1,,b:1", "between two commas"),
        (":1", "names no token file"),
    ],
)
def test_what_is_no_mixture_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_sources(text)
