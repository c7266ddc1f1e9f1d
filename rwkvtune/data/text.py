"""From a text file to token files, with a share of it kept for validation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from rwkvtune.data.binidx import BinIdxWriter, binidx_prefix
from rwkvtune.data.tokenizers import (
    END_OF_DOCUMENT,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    save_data_tokenizer,
)
from rwkvtune.errors import MissingFileError, UserError


@dataclass(frozen=True)
class TextSize:
    """What one pair of token files holds."""

    documents: int

    tokens: int
    """End-of-document tokens included."""

    text_bytes: int
    """UTF-8 bytes of the text."""


@dataclass(frozen=True)
class BuiltText:
    """What build_from_text wrote."""

    train: TextSize

    validation: TextSize | None
    """None when no share was asked for."""

    tokenizer: Tokenizer


def build_from_text(
    source: str | os.PathLike[str] | Sequence[str],
    prefix: str | os.PathLike[str],
    tokenizer: Tokenizer | str,
    *,
    val_share: float = 0.0,
) -> BuiltText:
    """Write PREFIX.bin/.idx, and PREFIX_val.bin/.idx when val_share > 0.

    source: path of a .txt file (one document) or a .jsonl file (one document per line, in `text`),
    or the documents themselves in a list. Each is followed by END_OF_DOCUMENT.
    tokenizer: one of ours, `chars` for the characters of this text, or a name for load_tokenizer.
    It is kept beside the token files, where find_tokenizer(prefix) finds it.
    val_share: 0 to below 1, the share of the characters, taken from the end. A single document is
    cut at character int(length * (1 - val_share)), of several each stays whole.
    """
    documents = read_documents(source) if isinstance(source, str | os.PathLike) else list(source)
    if isinstance(tokenizer, str):
        if tokenizer == "chars":
            tokenizer = CharTokenizer.from_text("".join(documents))
        else:
            tokenizer = load_tokenizer(tokenizer)
    train, validation = _split(documents, val_share)
    prefix = binidx_prefix(prefix)
    validation_size = _write(validation, f"{prefix}_val", tokenizer) if validation else None
    return BuiltText(_write(train, prefix, tokenizer), validation_size, tokenizer)


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """Documents of a .txt (the whole file is one) or .jsonl file (`text` of each line), exactly.

    Raises MissingFileError, or UserError with the line or byte that cannot be used.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: expected a .txt or .jsonl file of UTF-8 text.")
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}. Give the path of a .txt or .jsonl file.")
    content = path.read_bytes()
    if path.suffix == ".txt":
        documents = [_decoded(content, str(path))]
    else:
        documents = [
            _text_field(line, f"{path}: line {number}")
            for number, line in enumerate(content.split(b"\n"), start=1)
            if line.strip()
        ]
    if not any(documents):
        raise UserError(f"{path}: holds no text. Give a file with at least one character.")
    return documents


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} ({content[error.start]:#04x}) is not UTF-8 "
            f"({error.reason}). Convert the file to UTF-8."
        ) from None


def _text_field(line: bytes, where: str) -> str:
    """`text` of one line of JSON."""
    try:
        record = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}): {line[:60]!r}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f'{where}: expected {{"text": "..."}}, found {line[:60]!r}. Each line is one document.'
        )
    return text


def _split(documents: list[str], val_share: float) -> tuple[list[str], list[str]]:
    """Documents for training and for validation; the latter are empty when val_share is 0."""
    if not 0 <= val_share < 1:
        raise UserError(f"val_share={val_share}: expected a share from 0 to below 1, such as 0.1.")
    if val_share == 0:
        return documents, []
    if len(documents) == 1:
        # int(0.9 * length) for a tenth is nanoGPT's split of its Shakespeare file.
        cut = int(len(documents[0]) * (1 - val_share))
        parts = [documents[0][:cut]], [documents[0][cut:]]
    else:
        ends = list(accumulate(map(len, documents)))
        first_kept = next(i for i, end in enumerate(ends) if end > ends[-1] * (1 - val_share))
        parts = documents[:first_kept], documents[first_kept:]
    if not (any(parts[0]) and any(parts[1])):
        raise UserError(
            f"val_share={val_share} leaves nothing for training or for validation of "
            f"{len(documents)} documents with {sum(map(len, documents))} characters. "
            "Give more text or another share."
        )
    return parts


def _write(documents: list[str], prefix: str, tokenizer: Tokenizer) -> TextSize:
    tokens = text_bytes = 0
    with BinIdxWriter(prefix, tokenizer.vocab_size) as writer:
        for number, document in enumerate(documents):
            try:
                ids = tokenizer.encode(document)
            except UserError as error:
                raise UserError(f"document {number}: {error}") from None
            writer.add_document([*ids, END_OF_DOCUMENT])
            tokens += len(ids) + 1
            text_bytes += len(document.encode())
        save_data_tokenizer(tokenizer, prefix)
    return TextSize(len(documents), tokens, text_bytes)
