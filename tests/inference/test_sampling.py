"""Frequencies of drawn tokens against probabilities worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvtune.errors import UserError
from rwkvtune.inference.sampling import sample

DRAWS = 20_000

CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}
"""What chi-square exceeds once in a thousand, by degrees of freedom (any statistics table)."""


def assert_frequencies(probabilities: list[float], logits: list[float], **settings: object) -> None:
    """Draw from one row of logits DRAWS times and compare with the probabilities."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor(logits).expand(DRAWS, -1)
    ids = sample(rows, generator=generator, **settings)  # type: ignore[arg-type]
    found = torch.bincount(ids, minlength=len(logits)).tolist()
    assert [n for n, p in zip(found, probabilities, strict=True) if p == 0 and n] == []
    expected = [(n, p * DRAWS) for n, p in zip(found, probabilities, strict=True) if p]
    chi_square = sum((n - e) ** 2 / e for n, e in expected)
    assert chi_square < CHI_SQUARE_999[len(expected) - 1]


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.2, 0.25, 0.05)]


@pytest.mark.parametrize(
    ("settings", "probabilities"),
    [
        ({}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        # Half the temperature squares the probabilities: 100 1600 400 625 25 of 2750.
        ({"temperature": 0.5}, [100 / 2750, 1600 / 2750, 400 / 2750, 625 / 2750, 25 / 2750]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        # 0.4 + 0.25 do not reach 0.7, the next does; 0.65 is reached by two.
        ({"top_p": 0.7}, [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        ({"top_p": 0.64}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        # top_p looks at the probabilities that top_k left: 8/17, 5/17, 4/17.
        ({"top_k": 3, "top_p": 0.7}, [0, 8 / 13, 0, 5 / 13, 0]),
        # The temperature comes before top_p: 1600 + 625 of 2750 is 0.81.
        ({"temperature": 0.5, "top_p": 0.8}, [0, 1600 / 2225, 0, 625 / 2225, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_the_formula_says(
    settings: dict[str, float], probabilities: list[float]
) -> None:
    assert_frequencies(probabilities, LOGITS, **settings)


def test_penalties_lower_the_logits_of_tokens_that_came_before() -> None:
    counts = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.0])
    # With presence log 2 and frequency log 3: 0.4 / (2 * 9) and 0.2 / (2 * 3).
    weights = [0.1, 0.4 / 18, 0.2 / 6, 0.25, 0.05]
    assert_frequencies(
        [w / sum(weights) for w in weights],
        LOGITS,
        presence_penalty=math.log(2),
        frequency_penalty=math.log(3),
        counts=counts,
    )


def test_temperature_zero_takes_the_largest_and_the_lower_id_of_two_equal_ones() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]])
    assert sample(logits, temperature=0).tolist() == [1, 0]
    assert sample(logits, top_k=1).tolist() == [1, 0]
    assert sample(logits, top_p=1e-9).tolist() == [1, 0]


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[80.0, 90.0, -math.inf]])
    assert sample(logits, temperature=1e-38).tolist() == [1]


def test_rows_are_drawn_each_from_its_own_logits_and_excluded_tokens_never_come() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, -inf], [-inf, -inf, 0.0], [-inf, 0.0, -inf]])
    for chosen in ({}, {"top_k": 2}, {"top_p": 0.999}):
        assert sample(logits, **chosen).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        sample(torch.zeros(1, 4), **{name: value})  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(-6, 6), min_size=9, max_size=9), min_size=1, max_size=3),
    st.sampled_from([1e-3, 0.1, 0.5, 0.9, 0.999, 1.0]),
    st.integers(0, 10),
)
def test_only_tokens_of_the_nucleus_come_and_each_of_them_may(
    rows: list[list[int]], top_p: float, top_k: int
) -> None:
    """The witness sorts the whole row in Python; integers make many ties."""
    logits = torch.tensor(rows, dtype=torch.float32)
    drawn = torch.stack([
        sample(logits, top_p=top_p, top_k=top_k, temperature=5.0) for _ in range(30)
    ])  # fmt: skip
    for i, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda id: (-row[id], id))[: top_k or None]
        weights = [math.exp(row[id] / 5) for id in order]
        kept: list[int] = []
        mass = 0.0
        for id, weight in zip(order, weights, strict=True):
            if mass < top_p * sum(weights) + 1e-5 or not kept:  # a border hit exactly may round
                kept.append(id)
            mass += weight
        assert set(drawn[:, i].tolist()) <= set(kept)
        if top_k == 1 or top_p == 1e-3:
            assert set(drawn[:, i].tolist()) == {order[0]}


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="NaN"):
        sample(torch.tensor([[0.0, math.nan]]))
