"""The published program's tokenizers; `python tests/test_tokenizer_simple.py` runs this file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rwkv_trainer import (
    AngleTokenizer,
    GenericTokenizer,
    IntegerTokenizer,
    create_default_vocab_file,
    create_vocab_file_from_tokens,
)


def test_angles_are_their_degrees_plus_one() -> None:
    tokenizer = AngleTokenizer()
    assert tokenizer.vocab_size == 361
    assert tokenizer.encode_angle_sequence([0, 45, 90]) == [1, 46, 91]
    assert tokenizer.decode_angle_sequence([1, 46, 91]) == [0, 45, 90]
    assert tokenizer.decode(tokenizer.encode("123")) == "123"


@pytest.mark.parametrize("angle", [-1, 360])
def test_an_angle_out_of_range_is_a_value_error(angle: int) -> None:
    with pytest.raises(ValueError):
        AngleTokenizer().encode_angle_sequence([angle])


def test_integers_are_their_values_plus_one() -> None:
    tokenizer = IntegerTokenizer(max_value=999)
    assert tokenizer.encode_sequence([0, 100, 500, 999]) == [1, 101, 501, 1000]
    assert tokenizer.decode_sequence([1, 101, 501, 1000]) == [0, 100, 500, 999]


def test_vocabularies_are_saved_and_read_again(tmp_path: Path) -> None:
    AngleTokenizer().save_vocab(tmp_path / "angles.txt")
    assert AngleTokenizer(tmp_path / "angles.txt").encode("359") == [360]
    path = create_default_vocab_file(tmp_path / "integers.txt", max_value=99)
    assert IntegerTokenizer(vocab_file=path).vocab_size == 101
    create_vocab_file_from_tokens(["hello", "world", " ", "!"], tmp_path / "words.txt")
    assert GenericTokenizer(tmp_path / "words.txt").encode("hello world!") == [1, 3, 2, 4]


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
