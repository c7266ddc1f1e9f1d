"""One id per character, for a vocabulary taken from a text."""

from __future__ import annotations

import os
from array import array
from typing import Any

import numpy as np

from rwkvtune.data.tokenizers.base import TableTokenizer, save_json, utf8
from rwkvtune.errors import UserError


class CharTokenizer(TableTokenizer):
    """Id 0 ends a document; ids 1, 2, ... are the characters (Unicode code points) in the given
    order.
    """

    name = "chars"

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise UserError(
                "a character vocabulary needs at least one character and each once; got "
                f"{len(characters)} characters, {len(set(characters))} of them different. Make it "
                "with CharTokenizer.from_text."
            )
        utf8(characters)
        super().__init__([b"", *(character.encode() for character in characters)])
        self.characters = characters
        codes = code_points(characters)
        self._ids = np.zeros(int(codes.max()) + 2, np.uint32)  # the last: all that lie beyond
        self._ids[codes] = 1 + np.arange(len(codes), dtype=np.uint32)

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The vocabulary of all characters in the text, by code point."""
        return cls("".join(sorted(set(text))))

    def _append_ids(self, ids: array[int], text: str, encoded: bytes) -> None:
        found = self._ids.take(code_points(text), mode="clip")
        if not found.all():
            position = int(np.argmin(found))
            raise UserError(
                f"character {text[position]!r} at position {position} is not among the "
                f"{len(self.characters)} characters of this vocabulary. Remove it, or make a "
                "vocabulary from text that has it and train with that."
            )
        ids.frombytes(found.tobytes())

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name, "characters": self.characters}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as JSON; load_tokenizer(path) reads it."""
        save_json(self, path)


def code_points(text: str) -> np.ndarray:
    """[len(text)] uint32."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
