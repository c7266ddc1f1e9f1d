"""The base of tokenizers that users write themselves."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT, EncodedTexts, utf8
from rwkvtune.data.tokenizers.vocabulary import save_vocabulary
from rwkvtune.errors import UserError


class BaseTokenizer:
    """A tokenizer with `encode`, `decode` and `vocab_size`; all else that a Tokenizer offers
    follows from these three.

    encode must give ids from 1 to vocab_size - 1: id 0 ends a document.
    """

    name = "custom"
    vocab_size: int
    """Rows that a model for it needs; may be a property."""
    unused_ids: Collection[int] = ()

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError(f"{type(self).__name__} has no encode(text)")

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError(f"{type(self).__name__} has no decode(ids)")

    def encode_documents(self, texts: Sequence[str], *, unfinished: bool = False) -> EncodedTexts:
        collected: list[int] = []
        ends = []
        for text in texts:
            ids = list(self.encode(text))
            self._check_ids(ids)
            collected += [*ids, END_OF_DOCUMENT]
            ends.append(len(collected))
        if unfinished:
            collected.pop()
            ends[-1] -= 1
        return EncodedTexts(
            np.array(collected, np.int64),
            np.diff(np.array(ends, np.int64), prepend=0),
            np.array([len(utf8(text)) for text in texts], np.int64),
        )

    def _check_ids(self, ids: Sequence[int]) -> None:
        for position, id in enumerate(ids):
            if not END_OF_DOCUMENT < id < self.vocab_size:
                raise UserError(
                    f"{type(self).__name__}.encode gave the id {id} for token {position}: expected "
                    f"1 to {self.vocab_size - 1} (vocab_size {self.vocab_size}; id 0 ends a "
                    "document). Correct encode or vocab_size."
                )

    def last_cut(self, encoded: bytes) -> int:
        return 0  # nothing is known about where tokens end

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(list(ids)).encode()

    def token_byte_lengths(self) -> np.ndarray:
        """[vocab_size] int64: number of bytes that each id alone decodes to."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for id in range(1, self.vocab_size):
            lengths[id] = len(self.decode_bytes([id]))
        return lengths

    def save_vocab(self, path: str | os.PathLike[str]) -> None:
        """Write a vocabulary file with what each id alone decodes to."""
        decoded = {id: self.decode_bytes([id]) for id in range(1, self.vocab_size)}
        save_vocabulary({id: token for id, token in decoded.items() if token}, path)

    def to_json(self) -> dict[str, Any]:
        """Says only that there was one: its class is needed to make it again."""
        return {"kind": self.name, "class": type(self).__qualname__}
