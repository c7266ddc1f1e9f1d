"""Whole numbers as tokens. The published ids are those of the original program; see
tests/published/test_rwkv_trainer_doc.py for its printed examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvtune.data.tokenizers import find_tokenizer, save_tokenizer, tokenizer_from_json
from rwkvtune.data.tokenizers.integers import (
    AngleTokenizer,
    IntegerTokenizer,
    create_default_vocab_file,
)
from rwkvtune.errors import MissingFileError, UserError

VALUES = st.lists(st.integers(0, 999), max_size=50)


@given(VALUES)
def test_ids_are_the_values_plus_one_whichever_way_they_come(values: list[int]) -> None:
    tokenizer = IntegerTokenizer(max_value=999)
    expected = [value + 1 for value in values]
    text = "  ".join(map(str, values))
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_sequence(np.array(values, np.uint16)) == expected
    assert tokenizer.decode_sequence(expected) == values
    assert tokenizer.decode(expected) == " ".join(map(str, values))


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_many_documents_at_once_are_the_same_ids_with_zeros_between(rows: list[list[int]]) -> None:
    encoded = IntegerTokenizer(999).encode_documents([" ".join(map(str, r)) for r in rows])
    expected = [[value + 1 for value in row] + [0] for row in rows]
    assert encoded.ids.tolist() == sum(expected, [])
    assert encoded.sizes.tolist() == list(map(len, expected))


@given(VALUES.filter(bool))
def test_a_text_may_be_cut_where_last_cut_says(values: list[int]) -> None:
    tokenizer = IntegerTokenizer(999)
    text = " ".join(map(str, values))
    cut = tokenizer.last_cut(text.encode())
    assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)
    assert (cut > 0) == (" " in text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 2 x", "'x' at position 2 is not a whole number"),
        ("1_0", "'1_0' at position 0"),
        ("\N{ARABIC-INDIC DIGIT THREE}", "position 0 is not a whole number"),
        ("2.5", "'2.5' at position 0"),
        ("5 1000 7", "got 1000 at position 1. Use IntegerTokenizer(max_value=1000)"),
        ("-1", "got -1 at position 0"),
    ],
)
def test_a_value_without_an_id_is_named_with_its_position(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        IntegerTokenizer(999).encode(text)
    assert said in str(error.value)


def test_sequences_take_whole_floats_and_no_others() -> None:
    assert IntegerTokenizer(9).encode_sequence([2.0, 3]) == [3, 4]  # type: ignore[list-item]
    for bad in (0.5, float("nan"), "3", None):
        with pytest.raises(UserError, match="position 1"):
            IntegerTokenizer(9).encode_sequence([1, bad])  # type: ignore[list-item]
    with pytest.raises(UserError, match="Invalid token ID 11 at position 0"):
        IntegerTokenizer(9).decode_sequence([11])


def test_the_vocabulary_can_be_saved_and_read_again(tmp_path: Path) -> None:
    tokenizer = IntegerTokenizer(12, padded_vocab_size=64)
    assert tokenizer.vocab_size == 64
    tokenizer.save_vocab(tmp_path / "vocab.txt")
    lines = (tmp_path / "vocab.txt").read_text().splitlines()
    assert lines[:3] == ["0 b'\\x00' 1", "1 '0' 1", "2 '1' 1"] and lines[-1] == "13 '12' 2"
    assert IntegerTokenizer(vocab_file=tmp_path / "vocab.txt").max_value == 12
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())), "here")
    assert (again.vocab_size, again.encode("12")) == (64, [13])
    save_tokenizer(tokenizer, tmp_path)
    kept = find_tokenizer(tmp_path)
    assert kept is not None and kept.to_json() == tokenizer.to_json()


def test_comments_and_blank_lines_in_a_vocabulary_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("# values\n\n0 '' 0\n1 '0' 1  # nought\n2 '1' 1\n")
    assert IntegerTokenizer(vocab_file=path).max_value == 1


def test_vocabularies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = create_default_vocab_file(tmp_path / "vocab.txt", 9)
    assert path == str(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="max_value=5, but .* has the values 0 to 9"):
        IntegerTokenizer(5, vocab_file=path)
    with pytest.raises(UserError, match="angles are 0 to 359"):
        AngleTokenizer(path)
    with pytest.raises(MissingFileError, match="no such file"):
        IntegerTokenizer(vocab_file=tmp_path / "absent.txt")
    (tmp_path / "words.txt").write_text("1 'hello' 5\n")
    with pytest.raises(UserError, match="id 1 stands for b'hello', expected '0'"):
        IntegerTokenizer(vocab_file=tmp_path / "words.txt")
    for bad in (-1, 2.5, True, 2**40):
        with pytest.raises(UserError, match="max_value"):
            IntegerTokenizer(bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="padded_vocab_size=10 is less than the 11"):
        IntegerTokenizer(9, padded_vocab_size=10)
