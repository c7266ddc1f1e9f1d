"""One id per byte: any text, no vocabulary to make or keep."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from rwkvtune.data.tokenizers.base import TableTokenizer


class ByteTokenizer(TableTokenizer):
    """257 ids: 0 ends a document, id = byte + 1."""

    name = "bytes"

    def __init__(self) -> None:
        super().__init__([b"", *(bytes([byte]) for byte in range(256))])

    def _append_ids(self, ids: array[int], text: str, encoded: bytes) -> None:
        ids.frombytes(np.add(np.frombuffer(encoded, np.uint8), 1, dtype=np.uint32).tobytes())

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name}
