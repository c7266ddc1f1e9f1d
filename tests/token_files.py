"""Token files for tests, from documents written down in the test."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rwkvtune.data.build import build_token_files


def write_token_files(
    documents: Iterable[str], prefix: Path, tokenizer: str, *, val_share: float = 0.0
) -> None:
    """PREFIX.bin and .idx, by way of PREFIX.jsonl, which stays."""
    lines = Path(f"{prefix}.jsonl")
    lines.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    build_token_files(lines, prefix, tokenizer, val_share=val_share)
