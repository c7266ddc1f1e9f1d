"""Sampling orders against offsets that RWKV-LM's dataset class gave, and against what a shuffle has
to be.
"""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvtune.data.sampler import PublishedOrder, RandomOrder, ShuffledOrder, magic_prime
from rwkvtune.errors import UserError


@pytest.fixture(scope="module")
def upstream(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "sampler.json").read_text())
    return content


def test_published_order_gives_upstreams_offsets_on_both_ranks(upstream: dict[str, Any]) -> None:
    order = PublishedOrder(upstream["data_len"], upstream["ctx_len"])
    assert order.magic_prime == order.num_slots == upstream["magic_prime"]
    assert {case["rank"] for case in upstream["cases"]} == {0, 1}
    for case in upstream["cases"]:
        seen_before = case["epoch"] * upstream["samples_per_miniepoch"]
        ours = [
            order.start(seen_before + j * case["world_size"] + case["rank"])
            for j in range(len(case["offsets"]))
        ]
        assert ours == case["offsets"]


def test_magic_primes_are_those_of_published_data_sizes(upstream: dict[str, Any]) -> None:
    for case in upstream["more_magic_primes"]:
        if case["magic_prime"] is None:
            with pytest.raises(UserError, match=f"at least {3 * case['ctx_len']} "):
                magic_prime(case["data_len"], case["ctx_len"])
        else:
            assert magic_prime(case["data_len"], case["ctx_len"]) == case["magic_prime"]


def test_magic_prime_is_the_largest_that_fits_by_a_sieve() -> None:
    is_prime = np.ones(400, bool)
    is_prime[:2] = False
    for n in range(2, 20):
        is_prime[n * n :: n] = False
    for slots in range(3, 400):
        largest = max(p for p in range(2, slots) if is_prime[p] and p % 3 == 2)
        assert magic_prime(slots * 10, 10) == magic_prime(slots * 10 + 9, 10) == largest


@pytest.mark.parametrize("slots", [3, 4, 6, 12, 100, 1000])
def test_published_order_visits_each_window_once_and_repeats(slots: int) -> None:
    order = PublishedOrder(slots * 7, 7)
    p = order.num_slots
    first_pass = [order.start(i) for i in range(p)]
    assert sorted(first_pass) == [slot * 7 for slot in range(p)]
    assert [order.start(i) for i in range(p, 2 * p)] == first_pass
    assert max(first_pass) + 7 + 1 <= slots * 7


def test_published_order_is_exact_where_64_bits_overflow() -> None:
    order = PublishedOrder(332115325534, 4096)
    p, ii = 81082817, 10**9 + 1
    factor = (math.isqrt(5 * p * p) - p) // 2  # floor(p * (sqrt(5) - 1) / 2) in integers
    assert order.start(np.int64(ii - 1)) == factor * ii * ii * ii % p * 4096


@pytest.mark.parametrize("tokens", [0, 1, 32, 33, 95])
def test_too_few_tokens_for_the_published_order_says_how_many_are_needed(tokens: int) -> None:
    with pytest.raises(UserError, match=f"{tokens} tokens are too few .* needs at least 96 ") as e:
        PublishedOrder(tokens, 32)
    assert "ctx_len <= 0" not in str(e.value)


@pytest.mark.parametrize("prime", [-5, 1, 3118, 3121, 3137])  # composite, 1 mod 3, beyond the data
def test_a_magic_prime_that_does_not_fit_is_refused_with_one_that_does(prime: int) -> None:
    message = rf"magic_prime={prime} does not fit .* p % 3 == 2 and p <= 3124 .*100000.* use 3119\."
    with pytest.raises(UserError, match=message):
        PublishedOrder(100000, 32, magic_prime=prime)


def test_a_magic_prime_made_for_another_ctx_len_is_refused() -> None:
    with pytest.raises(UserError, match=r"would leave 88% of this data unread.* use 2926181\."):
        PublishedOrder(1498226207, 512, magic_prime=365759)


def test_a_magic_prime_of_upstreams_choice_is_taken() -> None:
    assert PublishedOrder(100000, 32, magic_prime=3089).num_slots == 3089
    assert (
        PublishedOrder(66 * 16 + 6, 16, magic_prime=59).num_slots == 59
    )  # 0.894 of the windows, but the largest


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(2, 3000),
    ctx_len=st.integers(1, 60),
    seed=st.integers(),
    in_pass=st.integers(0, 10**9),
)
def test_shuffled_order_meets_each_target_once_per_pass_except_at_the_edges(
    num_tokens: int, ctx_len: int, seed: int, in_pass: int
) -> None:
    ctx_len = min(ctx_len, num_tokens - 1)
    order = ShuffledOrder(num_tokens, ctx_len, seed)
    assert order.num_slots == (num_tokens - 1) // ctx_len
    met = np.zeros(num_tokens, int)
    for i in range(order.num_slots):
        start = order.start(in_pass * order.num_slots + i)
        assert 0 <= start <= num_tokens - ctx_len - 1
        met[start + 1 : start + ctx_len + 1] += 1
    assert (met[2 * ctx_len : -2 * ctx_len] == 1).all()
    assert met.max() <= 2
    assert (met == 0).sum() + (met == 2).sum() < 4 * ctx_len


@pytest.mark.parametrize("left_over", range(7))
def test_shuffled_order_meets_every_target_within_some_passes(left_over: int) -> None:
    num_windows, ctx_len = 2, 7
    num_tokens = num_windows * ctx_len + left_over + 1
    order = ShuffledOrder(num_tokens, ctx_len, seed=5)
    starts = [order.start(i) for i in range(100 * num_windows)]
    assert min(starts) == 0 and max(starts) + ctx_len == num_tokens - 1
    assert {s + n for s in starts for n in range(1, ctx_len + 1)} == set(range(1, num_tokens))


def test_shuffled_order_is_another_one_for_each_pass_and_seed_and_the_same_each_time() -> None:
    def windows(seed: int, in_pass: int) -> list[int]:
        order = ShuffledOrder(64 * 1000, 64, seed)
        return [order.start(in_pass * 999 + i) for i in range(999)]

    orders = [windows(seed, in_pass) for seed in (1, 2, -1) for in_pass in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert windows(2, 1) == orders[4]
    assert (
        len(
            {min(order) % 64 for order in map(sorted, orders)}
            | {order[500] % 64 for order in orders}
        )
        > 4
    )


@pytest.mark.parametrize("num_windows", [2, 3, 5, 16, 97])
def test_every_window_is_equally_likely_at_every_place_of_the_shuffle(num_windows: int) -> None:
    passes = 400
    order = ShuffledOrder(
        num_windows + 1, 1, seed=3
    )  # ctx_len 1: no offset, so starts are the slots
    counts = np.zeros((num_windows, num_windows))
    for i in range(passes * num_windows):
        counts[i % num_windows, order.start(i)] += 1
    expected = passes / num_windows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (num_windows - 1) ** 2
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5  # five standard deviations


def test_all_permutations_of_three_windows_occur_equally_often() -> None:
    order = ShuffledOrder(4, 1, seed=11)
    seen = collections.Counter(tuple(order.start(3 * i + j) for j in range(3)) for i in range(3000))
    assert len(seen) == 6
    assert all(400 < count < 600 for count in seen.values())


def test_too_few_tokens_for_one_window_says_how_many_are_needed() -> None:
    for order in (ShuffledOrder, RandomOrder):
        with pytest.raises(
            UserError, match="32 tokens are too few for ctx_len 32: one window needs 33"
        ):
            order(32, 32, seed=1)
        assert order(33, 32, seed=1).start(12345) == 0


def test_random_order_draws_every_start_equally_often_and_repeats_itself_exactly() -> None:
    draws, places = 40_000, 20 - 5  # starts 0 .. 14 leave room for 5 inputs and the last target
    order = RandomOrder(20, 5, seed=9)
    starts = [order.start(i) for i in range(draws)]
    counts = np.bincount(starts, minlength=places)
    assert len(counts) == places
    chi_square = ((counts - draws / places) ** 2 / (draws / places)).sum()
    assert chi_square < places - 1 + 5 * (2 * (places - 1)) ** 0.5  # five standard deviations
    assert starts[::-1] == [RandomOrder(20, 5, seed=9).start(i) for i in reversed(range(draws))]
    assert starts != [RandomOrder(20, 5, seed=10).start(i) for i in range(draws)]
