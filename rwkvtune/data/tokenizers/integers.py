"""One id per whole number, for sequences of numbers written with blanks between them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT, EncodedTexts, TableTokenizer, utf8
from rwkvtune.data.tokenizers.custom import BaseTokenizer
from rwkvtune.data.tokenizers.vocabulary import (
    MAX_ID,
    padded,
    read_vocabulary,
    save_vocabulary,
)
from rwkvtune.errors import UserError

DEFAULT_MAX_VALUE = 359
_BLANKS = b" \t\n\r\v\f"


class IntegerTokenizer(TableTokenizer, BaseTokenizer):
    """The value v from 0 to max_value has the id v + 1; id 0 ends a document. A text is values
    with blanks between them.

    vocab_file: one that save_vocab wrote; it decides max_value.
    padded_vocab_size: rows of the model, at least max_value + 2; 0 = max_value + 2.
    """

    name = "integers"

    def __init__(
        self,
        max_value: int = DEFAULT_MAX_VALUE,
        vocab_file: str | os.PathLike[str] | None = None,
        padded_vocab_size: int = 0,
    ) -> None:
        if vocab_file is not None:
            max_value = _max_value_of(vocab_file, max_value)
        self.max_value = _checked_max_value(max_value)
        rows = padded(self.max_value + 2, padded_vocab_size)
        self.unused_ids = range(self.max_value + 2, rows)
        # A number and the blank after it, so that the texts of single ids can be joined.
        table = [b"", *(b"%d " % value for value in range(self.max_value + 1))]
        super().__init__([*table, *[b"\xef\xbf\xbd"] * len(self.unused_ids)])

    def encode(self, text: str) -> list[int]:
        return [value + 1 for value in self._values(text)]

    def encode_documents(self, texts: Sequence[str], *, unfinished: bool = False) -> EncodedTexts:
        collected = array("q")
        ends = []
        for text in texts:
            ids = np.array(self._values(text), np.int64) + 1
            collected.frombytes(ids.tobytes())
            collected.append(END_OF_DOCUMENT)
            ends.append(len(collected))
        if unfinished:
            collected.pop()
            ends[-1] -= 1
        return EncodedTexts(
            np.frombuffer(collected, np.int64),
            np.diff(np.array(ends, np.int64), prepend=0),
            np.array([len(utf8(text)) for text in texts], np.int64),
        )

    def last_cut(self, encoded: bytes) -> int:
        return 1 + max(encoded.rfind(blank) for blank in _BLANKS)

    def _values(self, text: str) -> list[int]:
        parts = text.split()
        is_plain = text.isascii() and "_" not in text  # int() takes other digits, and 1_000
        try:
            values = list(map(int, parts)) if is_plain else []
        except ValueError:
            is_plain = False
        if not is_plain:
            position = next(i for i, part in enumerate(parts) if not _is_whole_number(part))
            raise UserError(
                f"{parts[position][:40]!r} at position {position} is not a whole number: "
                f"{type(self).__name__} takes whole numbers with blanks between them. For other "
                "text make a vocabulary (create_vocab_file_from_tokens) and use GenericTokenizer"
            )
        self._check(values)
        return values

    def _check(self, values: Sequence[int]) -> None:
        if len(values) and not 0 <= min(values) <= max(values) <= self.max_value:
            position = next(i for i, v in enumerate(values) if not 0 <= v <= self.max_value)
            raise UserError(self.out_of_range(values[position], f"at position {position}"))

    def out_of_range(self, value: int, where: str, largest: int = 0) -> str:
        """The message about a value that has no id.  largest: of all the values, where known."""
        hint = "Shift the values so that the smallest is 0"
        if max(value, largest) > MAX_ID:
            hint = "Values are too large for a vocabulary: bin them"
        elif value > self.max_value:
            hint = f"Use IntegerTokenizer(max_value={max(value, largest)})"
        return f"Value must be in [0, {self.max_value}], got {value} {where}. {hint}"

    def encode_sequence(self, sequence: Iterable[int]) -> list[int]:
        """Ids of the values."""
        values = []
        for position, value in enumerate(sequence):
            number = whole_number(value)
            if number is None:
                raise UserError(f"{value!r} at position {position} is not a whole number")
            values.append(number)
        self._check(values)
        return [value + 1 for value in values]

    def decode_sequence(self, tokens: Iterable[int]) -> list[int]:
        """Values of the ids; the ends of documents are left out."""
        values = []
        for position, id in enumerate(tokens):
            if not 0 <= id <= self.max_value + 1:
                raise UserError(
                    f"Invalid token ID {id} at position {position}: expected 0 to "
                    f"{self.max_value + 1}"
                )
            if id != END_OF_DOCUMENT:
                values.append(int(id) - 1)
        return values

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, self.decode_sequence(ids)))

    def save_vocab(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary file; the same class reads it as vocab_file."""
        create_default_vocab_file(path, self.max_value)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name, "max_value": self.max_value, "vocab_size": self.vocab_size}


class AngleTokenizer(IntegerTokenizer):
    """Whole degrees, 0 to 359."""

    name = "angles"

    def __init__(self, vocab_file: str | os.PathLike[str] | None = None) -> None:
        super().__init__(vocab_file=vocab_file)
        if self.max_value != DEFAULT_MAX_VALUE:
            raise UserError(
                f"{vocab_file}: has the values 0 to {self.max_value}; angles are 0 to "
                f"{DEFAULT_MAX_VALUE}. Use IntegerTokenizer"
            )

    def encode_angle_sequence(self, sequence: Iterable[int]) -> list[int]:
        return self.encode_sequence(sequence)

    def decode_angle_sequence(self, tokens: Iterable[int]) -> list[int]:
        return self.decode_sequence(tokens)

    def out_of_range(self, value: int, where: str, largest: int = 0) -> str:
        return f"Value must be in [0, {self.max_value}], got {value} {where}. Take it modulo 360"


def create_default_vocab_file(
    filepath: str | os.PathLike[str], max_value: int = DEFAULT_MAX_VALUE
) -> str:
    """Write the vocabulary file of IntegerTokenizer(max_value); returns its path."""
    values = range(_checked_max_value(max_value) + 1)
    save_vocabulary({1 + value: b"%d" % value for value in values}, filepath)
    return os.fspath(filepath)


def _checked_max_value(max_value: object) -> int:
    if isinstance(max_value, bool) or not isinstance(max_value, int | np.integer):
        raise UserError(f"max_value={max_value!r} must be a whole number")
    if not 0 <= max_value < MAX_ID:
        raise UserError(f"max_value={max_value} must be in 0 to {MAX_ID - 1}")
    return int(max_value)


def whole_number(value: object) -> int | None:
    """The value as an int; None for what is none, such as 0.5."""
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number == value and not isinstance(value, str | bytes) else None


def _is_whole_number(part: str) -> bool:
    digits = part[1:] if part[:1] in ("-", "+") else part
    return digits.isascii() and digits.isdigit()


def _max_value_of(path: str | os.PathLike[str], wanted: int) -> int:
    tokens = read_vocabulary(path)
    max_value = len(tokens) - 1
    wrong = [id for id, token in tokens.items() if token != b"%d" % (id - 1)]
    if wrong:
        raise UserError(
            f"{path}: id {wrong[0]} stands for {tokens[wrong[0]][:40]!r}, expected "
            f"{str(wrong[0] - 1)!r}: no vocabulary of whole numbers from 0 up. Use GenericTokenizer"
        )
    if wanted not in (DEFAULT_MAX_VALUE, max_value):
        raise UserError(
            f"max_value={wanted}, but {path} has the values 0 to {max_value}: leave one out"
        )
    return max_value
