"""What every tokenizer offers, and the parts that all of ours share."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write

END_OF_DOCUMENT = 0
"""Id that ends each document in a token file; no tokenizer gives it to text."""


class Tokenizer(Protocol):
    """Text to ids and back. No text gives id 0 (END_OF_DOCUMENT), and it decodes to nothing."""

    name: str
    """`bytes`, `chars` or `world`."""

    vocab_size: int
    """Rows that a model for it needs; every id is below."""

    unused_ids: Collection[int]
    """Ids that stand for no text and that no text gives, END_OF_DOCUMENT apart."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, which decode back to exactly it; UserError when that is not possible."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of the ids. A token may end inside a character: join bytes first when
        streaming.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""

    def token_byte_lengths(self) -> np.ndarray:
        """[vocab_size] int64: number of bytes that each id stands for."""

    def to_json(self) -> dict[str, Any]:
        """All that load_tokenizer needs to make the same one again."""


class TableTokenizer:
    """The way back from ids, for tokenizers in which each id stands for a fixed string of bytes.

    table: the bytes of ids 0, 1, 2, ...; empty for END_OF_DOCUMENT.
    """

    name: str
    unused_ids: Collection[int] = ()

    def __init__(self, table: Sequence[bytes]) -> None:
        self.vocab_size = len(table)
        self._table = table

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            position = next(i for i, id in enumerate(ids) if not 0 <= id < self.vocab_size)
            raise UserError(
                f"cannot decode id {ids[position]} at position {position}: the {self.name} "
                f"tokenizer has ids 0 to {self.vocab_size - 1}. Were these ids made with another "
                "tokenizer?"
            )
        return b"".join(map(self._table.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_byte_lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self._table), dtype=np.int64, count=self.vocab_size)


def utf8(text: str) -> bytes:
    """The text as UTF-8; UserError for half of a surrogate pair, which JSON can hold but UTF-8
    cannot.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate "
            "pair, which is not valid Unicode text. Repair or remove it in the input."
        ) from None


def save_json(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write what load_tokenizer(path) needs, whole or not at all."""
    content = json.dumps(tokenizer.to_json(), ensure_ascii=False, indent=1) + "\n"
    atomic_write(path, lambda file: file.write(content.encode()))
