"""The RWKV World vocabulary (rwkv_vocab_v20230424, 65529 tokens), encoded by pyrwkv-tokenizer
(Rust), which brings it.
"""

from __future__ import annotations

from array import array
from importlib.resources import files
from pathlib import Path
from typing import Any

from rwkvtune.data.tokenizers.base import TableTokenizer
from rwkvtune.data.tokenizers.vocabulary import (
    read_vocabulary,
    rust_encode,
    rust_tokenizer,
    table_of,
)

MODEL_ROWS = 65536
"""World checkpoints have this many rows; the vocabulary fills ids 1 to 65529."""


class WorldTokenizer(TableTokenizer):
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

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name}


def vocabulary_path() -> Path:
    """The vocabulary file that pyrwkv-tokenizer brings."""
    return Path(str(files("pyrwkv_tokenizer") / "rwkv_vocab_v20230424.txt"))
