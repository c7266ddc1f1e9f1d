"""Exact answers against answers written token by token."""

from __future__ import annotations

import torch

from rwkvtune.data.batch import IGNORED_TARGET, Batch
from rwkvtune.evaluation.exact_match import exact_matches
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.frame import LanguageModel

PROMPTS = [[5, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9]]
ANSWER = 4


def varied_model() -> LanguageModel:
    model = build_model(RWKV7Config(31, 2, 32, head_size=16), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


def written(model: LanguageModel, prompt: list[int]) -> list[int]:
    """The likeliest token after another, the whole text read again for each."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(ANSWER):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids


def test_a_row_is_right_when_the_model_would_write_it_to_the_last_token() -> None:
    model = varied_model().train()
    rows = torch.tensor([written(model, prompt) for prompt in PROMPTS])
    rows[1, 3] = (rows[1, 3] + 1) % 31  # wrong from the start
    rows[3, -1] = (rows[3, -1] + 1) % 31  # wrong at its end
    targets = rows[:, 1:].clone()
    targets[:, :2] = IGNORED_TARGET
    batches = [Batch(rows[:2, :-1], targets[:2]), Batch(rows[2:, :-1], targets[2:])]
    assert list(exact_matches(model, batches, device="cpu")) == [True, False, True, False, True]
    assert model.training, "left as it was"
