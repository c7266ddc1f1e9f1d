"""One id per byte: any text, no vocabulary to make or keep."""

from __future__ import annotations

from typing import Any

from rwkvtune.data.tokenizers.base import TableTokenizer, utf8


class ByteTokenizer(TableTokenizer):
    """257 ids: 0 ends a document, id = byte + 1."""

    name = "bytes"

    def __init__(self) -> None:
        super().__init__([b"", *(bytes([byte]) for byte in range(256))])

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in utf8(text)]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name}
