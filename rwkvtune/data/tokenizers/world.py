"""The RWKV World vocabulary (rwkv_vocab_v20230424, 65529 tokens), encoded by pyrwkv-tokenizer
(Rust), which brings it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT, PIECE_BYTES, MatchedTokenizer
from rwkvtune.data.tokenizers.vocabulary import (
    read_vocabulary,
    rust_encode,
    rust_tokenizer,
    table_of,
)

MODEL_ROWS = 65536
"""World checkpoints have this many rows; the vocabulary fills ids 1 to 65529."""

_ALONE = "\0"
"""Its token is the only one that holds it, so that no token lies across it: texts joined by it have
the ids that they have alone."""


class WorldTokenizer(MatchedTokenizer):
    """65536 ids: 0 ends a document, 1 to 65529 are tokens, the rest stands for no text and decodes
    to U+FFFD.

    Decoding uses our own table: the library's decode panics on ids without a token and on bytes
    that are not UTF-8, and cannot return part of a character.
    """

    name = "world"

    def __init__(self) -> None:
        table, self.unused_ids = table_of(read_vocabulary(vocabulary_path()), MODEL_ROWS)
        super().__init__(table)
        self._rust: Any = None

    def _append_ids(self, ids: array[int], text: str, encoded: bytes) -> None:
        if self._rust is None:  # 240 MB, for nothing where tokens are only decoded
            self._rust = rust_tokenizer()
        ids.fromlist(rust_encode(self._rust, text))

    def _append_documents(
        self, ids: array[int], texts: Sequence[str], all_encoded: Sequence[bytes]
    ) -> None:
        together: list[str] = []  # short ones: each call of the library takes its time
        size = 0
        for text, encoded in zip(texts, all_encoded, strict=True):
            is_short = len(encoded) <= PIECE_BYTES and _ALONE not in text
            if together and (not is_short or size + len(encoded) > PIECE_BYTES):
                self._append_joined(ids, together)
                together, size = [], 0
            if is_short:
                together.append(text)
                size += len(encoded) + 1
            else:
                super()._append_documents(ids, [text], [encoded])
        if together:
            self._append_joined(ids, together)

    def _append_joined(self, ids: array[int], texts: Sequence[str]) -> None:
        joined = _ALONE.join([*texts, ""])
        found = array("I")
        self._append_ids(found, joined, b"")
        values = np.frombuffer(found, np.uint32)
        values[values == self._table.index(_ALONE.encode())] = END_OF_DOCUMENT
        ids.extend(found)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name}


def vocabulary_path() -> Path:
    """The vocabulary file that pyrwkv-tokenizer brings."""
    return Path(str(files("pyrwkv_tokenizer") / "rwkv_vocab_v20230424.txt"))
