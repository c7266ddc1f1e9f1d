"""Log-probabilities of given tokens, many sequences at once, each with all that precedes it in
sight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvtune.data.batch import IGNORED_TARGET
from rwkvtune.errors import UserError
from rwkvtune.inference.generate import evaluating
from rwkvtune.models.layers import LayerState

WINDOW = 1024
"""Tokens of a sequence that the model reads at once; the state goes on to the next ones."""
LOGITS_IN_MEMORY = 2**25
"""That exist at once: 128 MB in fp32."""

PADDING = 0  # any id would do: what comes after a sequence reaches no token of it


class Scores(NamedTuple):
    """Of the counted tokens of one sequence."""

    log_probs: np.ndarray
    """fp32, nats."""
    is_likeliest: np.ndarray
    """bool: whether no other token was likelier."""


def score(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    counted_from: Sequence[int],
    *,
    batch_size: int,
    window: int = WINDOW,
) -> list[Scores]:
    """Score ids[start:] of each sequence, each token predicted from all those before it.

    counted_from: the starts, 1 or more: the first token is never predicted.
    Sequences of about the same length run together, in windows with their states carried along, so
    memory does not grow with the length. The results are those of batches of one, up to the
    rounding of sums in another order.
    """
    vocab_size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    largest = max((max(ids) for ids in sequences), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"the texts have token ids up to {largest}, the model knows 0 to {vocab_size - 1}: "
            "give the tokenizer that it was trained with"
        )
    scores: list[Scores] = [Scores(np.empty(0, np.float32), np.empty(0, bool))] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            found = _score_batch(
                model, [sequences[i] for i in chosen], [counted_from[i] for i in chosen], window
            )
            for i, one in zip(chosen, found, strict=True):
                scores[i] = one
    return scores


def _score_batch(
    model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int], window: int
) -> list[Scores]:
    """As `score`, for sequences that are sorted by length, the longest first."""
    device = next(model.parameters()).device
    lengths = [len(ids) - 1 for ids in sequences]  # of what is read: the last id is only predicted
    parts: list[list[Scores]] = [[] for _ in sequences]
    state: Any = None
    for begin in range(0, lengths[0], window):
        active = sum(length > begin for length in lengths)
        width = min(window, lengths[0] - begin)
        ids = torch.full((active, width), PADDING)
        targets = torch.full((active, width), IGNORED_TARGET)
        for row in range(active):
            here = torch.tensor(sequences[row][begin : begin + width + 1])
            ids[row, : len(here) - 1] = here[:-1]
            counted = max(starts[row] - 1 - begin, 0)
            targets[row, counted : len(here) - 1] = here[counted + 1 :]
        if state is not None:
            state = [LayerState(*(part[:active] for part in layer)) for layer in state]
        targets = targets.to(device)
        (log_probs, is_likeliest), state = model(
            ids.to(device), state, head=lambda hidden, weight, t=targets: _scores(hidden, weight, t)
        )
        ends = (targets != IGNORED_TARGET).sum(1).cumsum(0).tolist()
        for row, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            parts[row].append(Scores(log_probs[start:end], is_likeliest[start:end]))
    return [
        Scores(
            np.concatenate([part.log_probs for part in row] or [np.empty(0, np.float32)]),
            np.concatenate([part.is_likeliest for part in row] or [np.empty(0, bool)]),
        )
        for row in parts
    ]


def _scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """hidden [B, T, C], head weight [V, C], targets [B, T] -> log-probability of the n targets that
    count, row by row, and whether each is the likeliest; logits only of these."""
    counted = targets != IGNORED_TARGET
    rows, gold = hidden[counted], targets[counted]  # [n, C], [n]
    weight = weight.to(rows.dtype)
    at_once = max(1, LOGITS_IN_MEMORY // weight.shape[0])
    log_probs, is_likeliest = [], []
    for part, ids in zip(rows.split(at_once), gold.split(at_once), strict=True):
        logits = F.linear(part, weight).float()  # [rows, V]
        chosen = logits.gather(1, ids[:, None])[:, 0]
        log_probs.append(chosen - logits.logsumexp(1))
        is_likeliest.append(chosen == logits.max(1).values)
    return torch.cat(log_probs).cpu().numpy(), torch.cat(is_likeliest).cpu().numpy()
