"""Perplexity and bits per byte of documents against their definitions; intervals against a
bootstrap."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvtune.data.text import find_files
from rwkvtune.data.tokenizers import ByteTokenizer, load_tokenizer
from rwkvtune.evaluation.texts import documents_of, measure_texts, ratio, wilson
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.frame import LanguageModel

TEXTS = ["To be, or not", "à la carte", "x", "It is " * 60]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = build_model(RWKV7Config(257, 2, 32, head_size=16), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


def nats_of(model: LanguageModel, text: str) -> float:
    """-log p of the bytes of a text that follows token 0, fp64."""
    ids = [0, *(byte + 1 for byte in text.encode())]
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids[:-1]]))
    log_p = torch.log_softmax(logits[0].double(), dim=-1)
    return -sum(float(log_p[i, id]) for i, id in enumerate(ids[1:]))


def test_all_tokens_of_all_documents_count_once(model: LanguageModel) -> None:
    nats = sum(nats_of(model, text) for text in TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    found = measure_texts(model, TEXTS, ByteTokenizer(), batch_size=3, window=50)
    assert (found.documents, found.tokens, found.num_bytes) == (4, num_bytes, num_bytes)
    assert found.loss.value == pytest.approx(nats / num_bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / num_bytes), rel=1e-4)
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found.unit == "5 blocks of 256 tokens"  # the last text has 360


def test_documents_are_the_units_when_there_are_many(model: LanguageModel) -> None:
    documents = [f"document {i}: {'a' * (i % 7)}" for i in range(31)]
    found = measure_texts(model, documents, ByteTokenizer(), batch_size=8)
    assert found.unit == "31 documents"
    nats = [nats_of(model, text) for text in documents]
    assert found.loss.error == pytest.approx(ratio(nats, [*map(len, documents)]).error, rel=1e-3)
    low, high = found.loss.interval or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 * (found.loss.error or 0), rel=1e-4)
    assert found.perplexity_interval == pytest.approx((math.exp(low), math.exp(high)))


def test_the_error_of_a_ratio_is_what_a_bootstrap_finds() -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(50, 500, 400)
    nats = lengths * random.normal(3, 0.4, 400) + random.normal(0, 20, 400)
    estimate = ratio(nats.tolist(), lengths.tolist())
    draws = random.integers(0, 400, (4000, 400))
    means = nats[draws].sum(1) / lengths[draws].sum(1)
    assert estimate.error == pytest.approx(means.std(), rel=0.06)  # 4000 draws: 1.1 % itself
    assert estimate.value == pytest.approx(means.mean(), abs=0.003)


def test_one_unit_tells_nothing_of_the_error(model: LanguageModel) -> None:
    found = measure_texts(model, ["short"], ByteTokenizer(), batch_size=8)
    assert found.loss.error is found.loss.interval is found.perplexity_interval is None


def test_documents_of_files_are_whole(tmp_path: Path) -> None:
    long = "a long line of text\n" * 200_000  # read in parts
    (tmp_path / "a.txt").write_text(long)
    lines = ["one", "", "zwei\nmit Zeile", "三"]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": x}) + "\n" for x in lines))
    files, _ = find_files([tmp_path])
    tokenizer = load_tokenizer("bytes")
    assert [*documents_of(files[0], "text", tokenizer)] == [long]
    assert [*documents_of(files[1], "body", tokenizer)] == ["one", "zwei\nmit Zeile", "三"]


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (1, 4), (3, 3), (8, 10), (500, 1000)])
def test_the_interval_of_a_share_is_wilsons(right: int, total: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert wilson(right / total, total) == pytest.approx(expected, abs=1e-6)
