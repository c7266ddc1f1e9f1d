"""Witness: masks, schedules, padded and cached cases that the original program gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvtune.errors import UserError
from rwkvtune.models.alternating.masks import (
    RULES,
    Rule,
    as_text,
    causal_mask,
    special_layers,
    special_mask,
    split,
    with_generated,
)

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "alternating_masks.json").read_text()
)
VARIANTS = {"within": "alternating", "cross": "alternating_cross"}


def ids_of(values: list[int]) -> torch.Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize("name", ["within", "cross"])
def test_masks_are_those_of_the_original(name: str) -> None:
    ids = ids_of(GOLDEN["modality_ids"])
    mask = special_mask(RULES[VARIANTS[name]], ids, 12)
    assert as_text(mask[0, 0]) == GOLDEN["masks"][name]
    assert as_text(causal_mask(12, 12)[0, 0]) == GOLDEN["masks"]["causal"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_masks_are_those_of_the_original(side: str) -> None:
    case = GOLDEN["padding"][side]
    ids, keep = ids_of(case["modality_ids"]), ids_of(case["attention_mask"])
    assert as_text(causal_mask(15, 15, attention_mask=keep)[0, 0]) == case["causal"]
    for name, variant in VARIANTS.items():
        mask = special_mask(RULES[variant], ids, 15, attention_mask=keep)
        assert as_text(mask[0, 0]) == case[name]


@pytest.mark.parametrize("name", ["within", "cross"])
def test_a_decode_step_sees_what_the_full_forward_sees_or_the_originals_row(name: str) -> None:
    ids = with_generated(ids_of(GOLDEN["modality_ids"]), 13)
    for key, legacy in (("consistent", False), ("reference", True)):
        mask = special_mask(RULES[VARIANTS[name]], ids, 1, q_offset=12, legacy_decode_rows=legacy)
        assert as_text(mask[0, 0]) == GOLDEN["decode_step"][f"{key}_{name}"]
    case = GOLDEN["decode_step_image_first"]
    mask = special_mask(
        RULES[VARIANTS[name]], ids_of(case["modality_ids"]), 1, q_offset=4, legacy_decode_rows=True
    )
    assert as_text(mask[0, 0]) == case[f"reference_{name}"]


def test_the_default_schedule_is_the_originals() -> None:
    for layers, kinds in GOLDEN["schedule"].items():
        assert special_layers("alternate_keep_last", int(layers)) == tuple(
            kind == "alt" for kind in kinds
        )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("alternate", "010101"),
        ("first_k:2", "110000"),
        ("last_k:2", "000011"),
        ("first_k:0", "000000"),
        ("none", "000000"),
        ("0,3", "100100"),
        ([5, 1], "010001"),
        ([], "000000"),
    ],
)
def test_other_schedules_mark_the_layers_they_name(
    schedule: str | list[int], expected: str
) -> None:
    assert "".join(str(int(s)) for s in special_layers(schedule, 6)) == expected


@pytest.mark.parametrize("schedule", ["first_k:7", "odd", "6", [-1], "first_k"])
def test_a_schedule_that_does_not_fit_is_refused(schedule: str | list[int]) -> None:
    with pytest.raises(UserError, match="schedule"):
        special_layers(schedule, 6)


def test_random_patterns_follow_the_formula_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        num_keys = int(torch.randint(2, 15, (1,), generator=generator))
        ids = torch.randint(0, 3, (2, num_keys), generator=generator)
        allowed = tuple(
            tuple(row) for row in torch.randint(0, 2, (3, 3), generator=generator).bool().tolist()
        )
        itself = bool(torch.randint(0, 2, (1,), generator=generator))
        keep = torch.ones_like(ids)
        keep[1, : num_keys // 3] = 0
        mask = special_mask(Rule(allowed, itself), ids, num_keys, attention_mask=keep)
        for b in range(2):
            for q in range(num_keys):
                for k in range(num_keys):
                    pair = allowed[ids[b, q]][ids[b, k]] or (itself and q == k)
                    assert bool(mask[b, 0, q, k]) == (pair and k <= q and bool(keep[b, k]))


def test_rows_of_text_alone_follow_the_formula_or_become_causal() -> None:
    ids = torch.tensor([[0, 0, 0], [0, 1, 0]])
    cross = RULES["alternating_cross"]
    assert as_text(special_mask(cross, ids, 3)[0, 0]) == ["100", "010", "001"]
    as_causal = special_mask(cross, ids, 3, text_only="causal")
    assert as_text(as_causal[0, 0]) == ["100", "110", "111"]
    assert as_text(as_causal[1, 0]) == ["100", "110", "011"]


def test_a_rule_that_is_not_causal_shows_the_future() -> None:
    ids = torch.tensor([[0, 1, 1]])
    rule = Rule(((True, False), (False, True)), is_causal=False)
    assert as_text(special_mask(rule, ids, 3)[0, 0]) == ["100", "011", "011"]
    assert not rule.splits and RULES["alternating"].splits
    assert not RULES["alternating_cross"].splits


def test_splitting_covers_every_position_once_and_leaves_padding_alone() -> None:
    ids = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
    keep = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    groups = [(row, positions.tolist()) for row, positions in split(ids, keep).groups]
    assert groups == [
        (slice(0, 1), [0, 3]),
        (slice(0, 1), [1, 2]),
        (slice(1, 2), [0]),
        (slice(1, 2), [2, 3]),
        (slice(1, 2), [1]),
    ]
    assert [p.tolist() for _, p in split(ids[:1].repeat(3, 1)).groups] == [[0, 3], [1, 2]]


def test_a_table_that_is_not_square_is_refused() -> None:
    with pytest.raises(UserError, match="square"):
        Rule(((True,), (False, True)))
