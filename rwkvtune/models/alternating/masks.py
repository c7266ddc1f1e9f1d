"""Which token may attend to which in a layer of an alternating-attention decoder, and which layers
are special.

A special layer ANDs a rule about modalities with the causal mask; the other layers are plain
causal. Nothing else differs: there are no parameters of its own.

    allowed(q, k) = causal(q, k) and padding[k] and (rule[m_q][m_k] or q == k)

m: modality of a position, 0 = text (markup, padding and generated tokens too), 1 = visual.
Masks are boolean, True = may attend, [B, 1, Q, K].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rwkvtune.errors import UserError

TEXT, VISUAL = 0, 1

TextOnly = Literal["formula", "causal"]

DEFAULT_SCHEDULE = "alternate_keep_last"
SCHEDULES = ("alternate_keep_last", "alternate", "first_k:K", "last_k:K", "none", "1,3,5 (a list)")


@dataclass(frozen=True)
class Rule:
    """Who sees whom in a special layer."""

    allowed: tuple[tuple[bool, ...], ...]
    """allowed[m_q][m_k]: may a position of modality m_q attend to one of m_k?"""
    sees_itself: bool = True
    """Every position may attend to itself, whatever `allowed` says."""
    is_causal: bool = True
    """Only earlier positions (and itself). False shows prompts their own future."""

    def __post_init__(self) -> None:
        sizes = {len(row) for row in self.allowed}
        if sizes != {len(self.allowed)}:
            raise UserError(
                f"a mask rule is a square table of true and false, got {self.allowed!r}"
            )

    @property
    def splits(self) -> bool:
        """True when each modality sees exactly itself, so that a layer is one ordinary causal
        attention for each modality."""
        table = self.allowed
        return self.is_causal and all(
            bool(table[q][k]) == (q == k) for q in range(len(table)) for k in range(len(table))
        )


RULES: dict[str, Rule] = {
    "alternating": Rule(((True, False), (False, True))),
    "alternating_cross": Rule(((False, True), (True, False))),
}
"""The two published variants: within one modality; across modalities, and oneself."""


def special_layers(schedule: str | Sequence[int], num_layers: int) -> tuple[bool, ...]:
    """For each of `num_layers` layers: is it special?

    alternate_keep_last: odd layers but the last (the published models). alternate: odd layers.
    first_k:K, last_k:K: the first or last K. none. Or the layers themselves, counted from 0, as a
    list or as text "1,3,5". UserError for anything else.
    """
    if not isinstance(schedule, str):
        return _listed(list(schedule), num_layers)
    counted = re.fullmatch(r"(first|last)_k:(\d+)", schedule)
    if counted:
        k = int(counted[2])
        if k > num_layers:
            raise UserError(
                f"the schedule {schedule} asks for {k} layers, the model has {num_layers}"
            )
        first = 0 if counted[1] == "first" else num_layers - k
        return tuple(first <= i < first + k for i in range(num_layers))
    if schedule in ("alternate", "alternate_keep_last"):
        last_stays = schedule == "alternate_keep_last"
        return tuple(
            i % 2 == 1 and not (last_stays and i == num_layers - 1) for i in range(num_layers)
        )
    if schedule == "none":
        return (False,) * num_layers
    if re.fullmatch(r"\d+(,\d+)*", schedule):
        return _listed([int(part) for part in schedule.split(",")], num_layers)
    raise UserError(f"there is no schedule {schedule!r}: choose one of {'; '.join(SCHEDULES)}")


def _listed(layers: list[int], num_layers: int) -> tuple[bool, ...]:
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise UserError(
            f"the schedule names the layers {wrong}, the model has 0 to {num_layers - 1}"
        )
    return tuple(i in layers for i in range(num_layers))


def with_generated(modality_ids: Tensor, length: int) -> Tensor:
    """Modality ids [B, T] for `length` positions: generated ones are text, what exceeds is cut."""
    missing = length - modality_ids.shape[1]
    if missing <= 0:
        return modality_ids[:, :length]
    return torch.nn.functional.pad(modality_ids, (0, missing), value=TEXT)


def causal_mask(
    num_queries: int,
    num_keys: int,
    *,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The mask of a plain layer, [1 or B, 1, Q, K].

    q_offset: position of the first query; keys are counted from 0.
    attention_mask: [B, up to K], 0 at padding; keys beyond it exist only in a static cache and are
    hidden by causality.
    """
    device = attention_mask.device if attention_mask is not None else device
    q = torch.arange(num_queries, device=device)[:, None] + q_offset
    mask = (torch.arange(num_keys, device=device) <= q)[None, None]
    return mask if attention_mask is None else mask & _key_padding(attention_mask, num_keys)


def _key_padding(attention_mask: Tensor, num_keys: int) -> Tensor:
    keep = attention_mask[:, :num_keys].bool()
    if keep.shape[1] < num_keys:
        keep = torch.nn.functional.pad(keep, (0, num_keys - keep.shape[1]), value=True)
    return keep[:, None, None]  # [B, 1, 1, K]


def special_mask(
    rule: Rule,
    modality_ids: Tensor,
    num_queries: int,
    *,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    text_only: TextOnly = "formula",
    legacy_decode_rows: bool = False,
) -> Tensor:
    """The mask of a special layer, [B, 1, Q, K].

    modality_ids: [B, K] of all keys.  q_offset, attention_mask: as in `causal_mask`.
    text_only: "formula" follows the rule also in rows without a visual token (a cross layer then
    sees only itself there); "causal" makes such rows plain.
    legacy_decode_rows: take the rule's rows from position 0 on instead of from q_offset, a fault
    of the original program when it decodes with a cache.
    """
    num_keys, device = modality_ids.shape[1], modality_ids.device
    first = 0 if legacy_decode_rows else q_offset
    q = torch.arange(num_queries, device=device) + first
    table = torch.tensor(rule.allowed, dtype=torch.bool, device=device)
    # [B, Q, 1] and [B, 1, K] -> [B, Q, K]
    mask = table[modality_ids[:, q, None], modality_ids[:, None, :]]
    if rule.sees_itself:
        mask = mask | (torch.arange(num_keys, device=device) == q[:, None])
    if text_only == "causal":
        mask = mask | (modality_ids == TEXT).all(1)[:, None, None]
    mask = mask[:, None]
    if rule.is_causal:
        return mask & causal_mask(
            num_queries, num_keys, q_offset=q_offset, attention_mask=attention_mask, device=device
        )
    return mask if attention_mask is None else mask & _key_padding(attention_mask, num_keys)


@dataclass(frozen=True)
class Split:
    """Positions by modality, where each modality attends only to itself: exact, and without masks.

    The rotary embedding is applied before attention, so positions can be gathered, run through an
    ordinary causal attention and put back.
    """

    groups: tuple[tuple[slice, Tensor], ...]
    """(rows of the batch, their positions of one modality [n]), covering every position once."""


def split(modality_ids: Tensor, attention_mask: Tensor | None = None) -> Split:
    """Group the positions of modality_ids [B, T]; padding is a group of its own, which no real
    token sees. Rows of one pattern share their groups."""
    ids = modality_ids
    if attention_mask is not None:
        ids = ids.masked_fill(attention_mask[:, : ids.shape[1]] == 0, -1)
    is_shared = ids.shape[0] == 1 or bool((ids == ids[:1]).all())
    rows = [slice(None)] if is_shared else [slice(b, b + 1) for b in range(ids.shape[0])]
    groups = []
    for row in rows:
        pattern = ids[row][0]
        groups += [(row, (pattern == m).nonzero()[:, 0]) for m in pattern.unique().tolist()]
    return Split(tuple(groups))


def as_text(mask: Tensor) -> list[str]:
    """A [Q, K] mask as a line of 0 and 1 for each query."""
    return ["".join("1" if pair else "0" for pair in row) for row in mask.tolist()]
