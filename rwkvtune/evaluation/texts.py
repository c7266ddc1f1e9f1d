"""Perplexity and bits per byte of documents, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import nn

from rwkvtune.data.text import TextFile, read_batches
from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer
from rwkvtune.evaluation.scoring import WINDOW, score

CONFIDENCE_95 = 1.959964
"""Standard errors to each side of an estimate that hold the truth 95 times of 100."""
MANY_DOCUMENTS = 30
"""From so many on the documents are the sample; below, blocks of their tokens."""
BLOCK_TOKENS = 256


class Estimate(NamedTuple):
    value: float
    error: float | None
    """Standard error; None where a single unit says nothing of it."""
    ends: tuple[float, float] | None = None
    """Of the interval, where that does not reach equally far to both sides."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval."""
        if self.ends is not None:
            return self.ends
        if self.error is None:
            return None
        reach = CONFIDENCE_95 * self.error
        return self.value - reach, self.value + reach


def wilson(share: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of `total` samples: Wilson's score interval, which stays within
    0 and 1 and holds for few samples, and for none or all of them."""
    z, n, p = CONFIDENCE_95, total, share
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class TextResult:
    """What `measure_texts` found."""

    documents: int
    tokens: int
    num_bytes: int
    loss: Estimate
    """Nats per token."""
    bits_per_byte: Estimate
    unit: str
    """What the errors are taken over: "42 documents" or "17 blocks of 256 tokens"."""

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where a float ends."""
        return math.exp(self.loss.value) if self.loss.value < 700 else math.inf

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        if self.loss.interval is None:
            return None
        low, high = (math.exp(min(end, 700)) for end in self.loss.interval)
        return low, high


def documents_of(file: TextFile, key: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a .txt, .jsonl or .parquet file that are not empty."""
    begun: list[str] = []
    for batch in read_batches([file], key=key, last_cut=tokenizer.last_cut):
        texts = batch.documents().texts
        for i, text in enumerate(texts):
            begun.append(text)
            if not (batch.unfinished and i == len(texts) - 1):
                whole, begun = "".join(begun), []
                if whole:
                    yield whole


def measure_texts(
    model: nn.Module,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    window: int = WINDOW,
) -> TextResult:
    """Every token of every document predicted from END_OF_DOCUMENT and all of the document before
    it.

    documents: at least one, none of them empty. The errors are those of a ratio of sums over
    independent units. Blocks of one document are alike, so that where they are the units the
    interval is rather too narrow.
    """
    ids = [[END_OF_DOCUMENT, *tokenizer.encode(text)] for text in documents]
    scores = score(model, ids, [1] * len(ids), batch_size=batch_size, window=window)
    lengths = tokenizer.token_byte_lengths()
    nats, tokens, num_bytes = [], [], []
    size = BLOCK_TOKENS if len(documents) < MANY_DOCUMENTS else max(map(len, ids))
    for document, found in zip(ids, scores, strict=True):
        for begin in range(0, len(document) - 1, size):
            losses = -found.log_probs[begin : begin + size].astype(np.float64)
            block = document[1 + begin : 1 + begin + size]
            nats.append(losses.sum())
            tokens.append(len(block))
            num_bytes.append(lengths[block].sum())
    loss = ratio(nats, tokens)
    bits = ratio([value / math.log(2) for value in nats], num_bytes)
    unit = (
        f"{len(nats)} blocks of {size} tokens" if size == BLOCK_TOKENS else f"{len(nats)} documents"
    )
    return TextResult(len(documents), sum(tokens), int(sum(num_bytes)), loss, bits, unit)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum(numerators) / sum(denominators) over n units, and its standard error by linearization.

    Source: W. G. Cochran, Sampling Techniques, 3rd ed. (1977), section 6.4 (without the correction
    for a finite population).
    """
    x, y = np.array(numerators, np.float64), np.array(denominators, np.float64)
    n, value = len(x), float(x.sum() / y.sum())
    if n < 2:
        return Estimate(value, None)
    residuals = x - value * y
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(y.sum())
    return Estimate(value, error)
