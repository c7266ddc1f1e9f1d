"""The RWKV World vocabulary (rwkv_vocab_v20230424, 65529 tokens), encoded by pyrwkv-tokenizer
(Rust).
"""

from __future__ import annotations

import ast
from typing import Any

from rwkvtune.data.tokenizers.base import TableTokenizer, utf8
from rwkvtune.errors import UserError

MODEL_ROWS = 65536
"""World checkpoints have this many rows; the vocabulary fills ids 1 to 65529."""

_NO_TOKEN = "\N{REPLACEMENT CHARACTER}".encode()


class WorldTokenizer(TableTokenizer):
    """65536 ids: 0 ends a document, 1 to 65529 are tokens, the rest stands for no text and decodes
    to U+FFFD.

    Decoding uses our own table: the library's decode panics on ids without a token and on bytes
    that are not UTF-8, and cannot return part of a character.
    """

    name = "world"

    def __init__(self) -> None:
        from pyrwkv_tokenizer import RWKVTokenizer

        self._rust = RWKVTokenizer()
        table, self.unused_ids = _read_vocabulary(self._rust.vocab_filepath)
        super().__init__(table)

    def encode(self, text: str) -> list[int]:
        wanted = utf8(text)
        try:
            ids: list[int] = self._rust.encode(text)
        except BaseException as error:
            # Rust's panics are no Exception, so that `except Exception` lets them through.
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the World tokenizer failed on this text: {error}") from None
        # The library drops bytes that it has no token for, and says nothing.
        if b"".join(map(self._table.__getitem__, ids)) != wanted:
            raise UserError(
                f"the World tokenizer does not give this text back ({len(wanted)} bytes, beginning "
                f"{text[:40]!r}). Use the bytes tokenizer for it."
            )
        return ids

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name}


def _read_vocabulary(path: str) -> tuple[list[bytes], list[int]]:
    """Bytes of every id below MODEL_ROWS, from lines `<id> <str or bytes literal> <length in
    bytes>`, and the ids that have none.
    """
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    ids = [int(line.split(" ", 1)[0]) for line in lines]
    # One literal for all lines: three times faster than one each.
    literals = ast.literal_eval(
        "[" + ",".join(line[line.index(" ") : line.rindex(" ")] for line in lines) + "]"
    )
    table = [b"", *[_NO_TOKEN] * (MODEL_ROWS - 1)]
    for id, literal in zip(ids, literals, strict=True):
        table[id] = literal.encode() if isinstance(literal, str) else literal
    return table, sorted(set(range(1, MODEL_ROWS)) - set(ids))
