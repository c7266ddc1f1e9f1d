"""Tokenizers, and how a run folder or a data file keeps its own: `tokenizer.json` beside what it
belongs to.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT, Tokenizer, save_json
from rwkvtune.data.tokenizers.byte_level import ByteTokenizer
from rwkvtune.data.tokenizers.characters import CharTokenizer
from rwkvtune.errors import MissingFileError, UserError

__all__ = [
    "END_OF_DOCUMENT",
    "ByteTokenizer",
    "CharTokenizer",
    "Tokenizer",
    "find_tokenizer",
    "load_tokenizer",
    "save_data_tokenizer",
    "save_tokenizer",
]

_FILE_NAME = "tokenizer.json"


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer named by spec: `bytes`, `world`, or the path of a tokenizer.json."""
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "world":
        from rwkvtune.data.tokenizers.world import WorldTokenizer

        return WorldTokenizer()
    path = Path(spec)
    if spec == "chars" and not path.exists():
        raise UserError(
            "tokenizer 'chars' alone does not say which characters: give the path of its JSON "
            "file, as CharTokenizer.from_text(text).save(path) writes it."
        )
    if not path.is_file():
        raise MissingFileError(
            f"unknown tokenizer {str(spec)!r}: expected bytes, world, or the path of a "
            f"{_FILE_NAME}."
        )
    return _from_json(path)


def save_tokenizer(tokenizer: Tokenizer, run_dir: str | os.PathLike[str]) -> None:
    """Keep the tokenizer in a run folder."""
    save_json(tokenizer, Path(run_dir) / _FILE_NAME)


def save_data_tokenizer(tokenizer: Tokenizer, prefix: str | os.PathLike[str]) -> None:
    """Keep the tokenizer beside token files, as PREFIX.tokenizer.json."""
    save_json(tokenizer, f"{os.fspath(prefix)}.{_FILE_NAME}")


def find_tokenizer(where: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer kept with a run folder, a file in one (a checkpoint), or token files (prefix).

    Raises UserError when there is one that cannot be read.
    """
    path = Path(where)
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    candidates = [path / _FILE_NAME, Path(f"{stem}.{_FILE_NAME}")]
    if path.is_file():  # not for folders: the parent of a run folder is another run's business
        candidates.append(path.parent / _FILE_NAME)
    for candidate in candidates:
        if candidate.is_file():
            return _from_json(candidate)
    return None


def _from_json(path: Path) -> Tokenizer:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(
            f"{path}: not a tokenizer file: {error}. Expected JSON with a `kind`."
        ) from None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "chars" and isinstance(content.get("characters"), str):
        try:
            return CharTokenizer(content["characters"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if kind in ("bytes", "world"):
        return load_tokenizer(kind)
    raise UserError(
        f'{path}: no tokenizer of ours: expected {{"kind": "bytes"}}, {{"kind": "world"}} or '
        f'{{"kind": "chars", "characters": "..."}}, found {str(content)[:60]}.'
    )
