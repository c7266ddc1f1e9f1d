"""The compiled matcher against a greedy search in Python and the rwkv package's trie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="numba is not installed")

from rwkvtune.data.tokenizers import base, load_tokenizer
from rwkvtune.data.tokenizers.compiled import CompiledMatcher
from rwkvtune.data.tokenizers.vocabulary import VocabularyTokenizer
from rwkvtune.errors import UserError


def greedy(tokens: dict[int, bytes], text: bytes) -> list[int] | None:
    ids, position = [], 0
    by_bytes = {token: id for id, token in tokens.items()}
    while position < len(text):
        for size in range(max(map(len, by_bytes)), 0, -1):
            piece = text[position : position + size]
            if len(piece) == size and piece in by_bytes:
                break
        else:
            return None
        ids.append(by_bytes[piece])
        position += size
    return ids


LETTERS = st.binary(min_size=1, max_size=6).map(lambda b: bytes(97 + x % 4 for x in b))


@settings(deadline=None, max_examples=60)
@given(st.sets(st.binary(min_size=1, max_size=5) | LETTERS, min_size=1, max_size=60), st.data())
def test_the_longest_token_that_fits_is_taken(vocabulary: set[bytes], data: Any) -> None:
    tokens = dict(enumerate(sorted(vocabulary, key=hash), start=1))
    parts = st.lists(st.sampled_from(sorted(vocabulary)) | LETTERS, max_size=20).map(b"".join)
    texts = data.draw(st.lists(parts, min_size=1, max_size=4))
    expected = [greedy(tokens, text) for text in texts]
    found = CompiledMatcher(tokens.items()).encode(texts)
    if None in expected:
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == [id for ids in expected for id in (*ids, 0)]  # type: ignore[misc]


def test_a_vocabulary_of_pairs_of_bytes_has_room_for_all_of_them() -> None:
    tokens = {1 + a * 256 + b: bytes((a, b)) for a in range(64) for b in range(256)}
    text = np.random.default_rng(0).integers(0, 64, 2000, np.uint8).tobytes()
    found = CompiledMatcher(tokens.items()).encode([text])
    assert found is not None and found.tolist() == [*(greedy(tokens, text) or []), 0]


def test_much_world_text_keeps_the_ids_of_the_rwkv_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rwkv.utils import PIPELINE

    reference = PIPELINE(None, "rwkv_vocab_v20230424").tokenizer
    monkeypatch.setattr(base, "COMPILE_AFTER", 0)
    world = load_tokenizer("world")
    generator = np.random.default_rng(0)
    anything = "".join(map(chr, generator.integers(1, 0xD7FF, 3000)))
    texts = [
        anything,
        "",
        "  \n\n  def f(x):\n\treturn x\0",
        "a" * 300,
        "\u4f60\u597d \U0001f600" * 20,
    ]
    encoded = world.encode_documents(texts)
    expected = [[*reference.encode(text), 0] for text in texts]
    assert encoded.ids.tolist() == [id for ids in expected for id in ids]
    assert encoded.sizes.tolist() == [len(ids) for ids in expected]
    assert world.encode(texts[2]) == expected[2][:-1]


def test_text_that_no_token_fits_is_refused_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "COMPILE_AFTER", 0)
    tokenizer = VocabularyTokenizer({1: b"a", 2: b"ab"})
    assert tokenizer.encode("aab") == [1, 2]
    with pytest.raises(UserError, match="no token of the vocabulary fits at byte 3"):
        tokenizer.encode("aabc")
