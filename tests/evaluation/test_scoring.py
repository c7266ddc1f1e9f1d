"""Scores of many sequences at once against log-softmax over full logits, one sequence at a time, in
fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkvtune.errors import UserError
from rwkvtune.evaluation import scoring
from rwkvtune.evaluation.scoring import score
from rwkvtune.models import ModelConfig, RWKV5Config, RWKV6Config, RWKV7Config, build_model
from rwkvtune.models.frame import LanguageModel

VOCAB = 31
LENGTHS = [9, 2, 40, 17, 41, 1, 23]
SEQUENCES = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in LENGTHS]
STARTS = [1, 1, 5, 17, 33, 1, 22]


def some_model(config: ModelConfig) -> LanguageModel:
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return some_model(RWKV7Config(VOCAB, 2, 32, head_size=16))


@pytest.mark.parametrize(
    "config",
    [RWKV7Config(VOCAB, 2, 32, head_size=16), RWKV6Config(VOCAB, 2, 64), RWKV5Config(VOCAB, 2, 64)],
    ids=lambda config: config.version,
)
@pytest.mark.parametrize(("batch_size", "window"), [(1, 1024), (8, 1024), (3, 8), (8, 1)])
def test_scores_are_log_softmax_of_the_whole_text_before_each_token(
    config: ModelConfig, batch_size: int, window: int
) -> None:
    model = some_model(config)
    found = score(model, SEQUENCES, STARTS, batch_size=batch_size, window=window)
    for ids, start, scores in zip(SEQUENCES, STARTS, found, strict=True):
        assert len(scores.log_probs) == len(scores.is_likeliest) == max(len(ids) - start, 0)
        if len(ids) < 2:
            continue
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids[:-1]]))
        log_p = torch.log_softmax(logits[0].double(), dim=-1)
        expected = [float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))]
        np.testing.assert_allclose(scores.log_probs, expected, atol=2e-5)
        likeliest = [int(log_p[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]
        assert scores.is_likeliest.tolist() == likeliest


def test_padding_reaches_no_result(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = score(model, SEQUENCES, STARTS, batch_size=8, window=16)
    monkeypatch.setattr(scoring, "PADDING", VOCAB - 1)
    other = score(model, SEQUENCES, STARTS, batch_size=8, window=16)
    for one, same in zip(plain, other, strict=True):
        assert np.array_equal(one.log_probs, same.log_probs)


def test_few_logits_at_once_give_the_same(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = score(model, SEQUENCES, STARTS, batch_size=4)
    monkeypatch.setattr(scoring, "LOGITS_IN_MEMORY", 3 * VOCAB)
    pieces = score(model, SEQUENCES, STARTS, batch_size=4)
    for one, same in zip(plain, pieces, strict=True):
        np.testing.assert_allclose(one.log_probs, same.log_probs, atol=1e-5)


def test_an_id_beyond_the_model_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="ids up to 31, the model knows 0 to 30"):
        score(model, [[0, 31]], [1], batch_size=1)
