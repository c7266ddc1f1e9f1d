"""Vocabularies of one's own, against a matcher of a few lines, and users' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvtune.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    find_tokenizer,
    save_tokenizer,
)
from rwkvtune.data.tokenizers.custom import BaseTokenizer
from rwkvtune.data.tokenizers.generic import GenericTokenizer, create_vocab_file_from_tokens
from rwkvtune.data.tokenizers.world import WorldTokenizer
from rwkvtune.errors import UserError


def longest_match(tokens: Sequence[str], text: str) -> list[int] | None:
    """Ids by trying every token at every place; None where none fits."""
    ids, content = [], text.encode()
    while content:
        fitting = [(len(t.encode()), i) for i, t in enumerate(tokens, 1)
                   if content.startswith(t.encode())]  # fmt: skip
        if not fitting:
            return None
        length, id = max(fitting)
        ids.append(id)
        content = content[length:]
    return ids


TOKENS = st.lists(
    st.text("abé \n'\"\\#\N{GRINNING FACE}", min_size=1, max_size=4), min_size=1, max_size=12,
    unique=True,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tokens=TOKENS, data=st.data())
def test_text_is_cut_by_longest_match_and_comes_back(
    tmp_path: Path, tokens: list[str], data: st.DataObject
) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(tokens), max_size=20)))
    path = create_vocab_file_from_tokens(tokens, tmp_path / "vocab.txt")
    tokenizer = GenericTokenizer(path)
    expected = longest_match(tokens, text)
    if expected is None:  # the longest token led to a place that nothing fits
        with pytest.raises(UserError, match="no token of the vocabulary fits at byte"):
            tokenizer.encode(text)
        return
    assert tokenizer.encode(text) == tokenizer.encodeBytes(text.encode()) == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.decodeBytes(expected) == text.encode()
    tokenizer.save_vocab(tmp_path / "again.txt")
    assert GenericTokenizer(tmp_path / "again.txt").encode(text) == expected


def test_padding_gives_the_model_more_rows_and_survives_saving(tmp_path: Path) -> None:
    path = create_vocab_file_from_tokens(["a", "b"], tmp_path / "vocab.txt")
    tokenizer = GenericTokenizer(path, padded_vocab_size=64)
    assert (tokenizer.vocab_size, list(tokenizer.unused_ids)) == (64, list(range(3, 64)))
    save_tokenizer(tokenizer, tmp_path)
    kept = find_tokenizer(tmp_path)
    assert kept is not None and (kept.vocab_size, kept.encode("ba")) == (64, [2, 1])
    with pytest.raises(UserError, match="padded_vocab_size=2 is less than the 3 ids"):
        GenericTokenizer(path, padded_vocab_size=2)
    for wrong in (2**40, "64", True):
        with pytest.raises(UserError, match="padded_vocab_size=.* must be a whole number of at"):
            GenericTokenizer(path, padded_vocab_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.from_text("aé'\n\\")])
def test_the_vocabulary_of_any_tokenizer_makes_the_same_ids(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save_vocab(tmp_path / "vocab.txt")
    text = "é'a\\\n"
    assert GenericTokenizer(tmp_path / "vocab.txt").encode(text) == tokenizer.encode(text)


def test_the_world_vocabulary_works_as_a_file_too(tmp_path: Path) -> None:
    world = WorldTokenizer()
    world.save_vocab(tmp_path / "world.txt")
    generic = GenericTokenizer(tmp_path / "world.txt", padded_vocab_size=65536)
    text = "Hello, world! 你好，世界 \N{GRINNING FACE}\r\n"
    assert GenericTokenizer(tmp_path / "world.txt").vocab_size == 65530
    assert generic.encode(text) == world.encode(text)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["a", "b", "a"], r"tokens\[2\] is 'a', as is tokens\[0\]"),
        (["a", ""], r"tokens\[1\] is ''"),
        ([], "tokens is empty"),
        ("abc", "is one text"),
    ],
)
def test_lists_that_make_no_vocabulary_are_refused(
    tmp_path: Path, tokens: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        create_vocab_file_from_tokens(tokens, tmp_path / "vocab.txt")
    assert not list(tmp_path.iterdir())


def test_code_in_a_vocabulary_file_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "vocab.txt", tmp_path / "trace"
    path.write_text(f"1 open('{trace}','w').name 5\n")
    with pytest.raises(UserError, match="line 1"):
        GenericTokenizer(path)
    assert not trace.exists()


class Letters(BaseTokenizer):
    """a = 1, b = 2."""

    vocab_size = 3

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: object) -> str:
        return "".join(chr(96 + id) for id in ids)  # type: ignore[attr-defined]


def test_a_class_with_three_members_is_a_whole_tokenizer(tmp_path: Path) -> None:
    tokenizer = Letters()
    encoded = tokenizer.encode_documents(["ab", "", "b"])
    assert encoded.ids.tolist() == [1, 2, 0, 0, 2, 0] and encoded.sizes.tolist() == [3, 1, 2]
    assert tokenizer.token_byte_lengths().tolist() == [0, 1, 1]
    tokenizer.save_vocab(tmp_path / "vocab.txt")
    assert GenericTokenizer(tmp_path / "vocab.txt").encode("ba") == [2, 1]
    with pytest.raises(UserError, match="Letters.encode gave the id 3 for token 1"):
        tokenizer.encode_documents(["ac"])
    save_tokenizer(tokenizer, tmp_path)
    assert find_tokenizer(tmp_path) is None
