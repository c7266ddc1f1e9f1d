"""Tokenizers, and how a run folder or a data file keeps its own: `tokenizer.json` beside what it
belongs to.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT, Tokenizer, as_json, save_json
from rwkvtune.data.tokenizers.byte_level import ByteTokenizer
from rwkvtune.data.tokenizers.characters import CharTokenizer
from rwkvtune.errors import MissingFileError, UserError

__all__ = [
    "END_OF_DOCUMENT",
    "ByteTokenizer",
    "CharTokenizer",
    "Tokenizer",
    "as_json",
    "data_tokenizer_path",
    "find_tokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "tokenizer_from_json",
]

_FILE_NAME = "tokenizer.json"


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer named by spec: `bytes`, `world`, or the path of a tokenizer.json or of a
    vocabulary file in RWKV's format.
    """
    if spec in ("bytes", "world"):
        return tokenizer_from_json({"kind": spec}, str(spec))
    path = Path(spec)
    if spec == "chars" and not path.exists():
        raise UserError(
            "tokenizer 'chars' alone does not say which characters: give the path of its JSON "
            "file, as CharTokenizer.from_text(text).save(path) writes it."
        )
    if not path.is_file():
        raise MissingFileError(
            f"unknown tokenizer {str(spec)!r}: expected bytes, world, or the path of a "
            f"{_FILE_NAME} or a vocabulary file."
        )
    if path.suffix == ".json":
        return tokenizer_from_json(_json_content(path), str(path))
    from rwkvtune.data.tokenizers.vocabulary import (
        VocabularyTokenizer,
        is_world_vocabulary,
        read_vocabulary,
    )

    tokens = read_vocabulary(path)
    if is_world_vocabulary(path):  # the same ids; models for it have more rows than it has tokens
        return load_tokenizer("world")
    return VocabularyTokenizer(tokens)


def save_tokenizer(tokenizer: Tokenizer, run_dir: str | os.PathLike[str]) -> None:
    """Keep the tokenizer in a run folder."""
    save_json(tokenizer, Path(run_dir) / _FILE_NAME)


def data_tokenizer_path(prefix: str | os.PathLike[str]) -> Path:
    """Where token files keep their tokenizer (as_json), for find_tokenizer."""
    return Path(f"{os.fspath(prefix)}.{_FILE_NAME}")


def find_tokenizer(where: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer kept with a run folder, a file in one (a checkpoint), or token files (prefix).
    None also for one of a user's own class, which the file cannot make again.

    Raises UserError when there is one that cannot be read.
    """
    path = Path(where)
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    candidates = [path / _FILE_NAME, data_tokenizer_path(stem)]
    if path.is_file():  # not for folders: the parent of a run folder is another run's business
        candidates.append(path.parent / _FILE_NAME)
    for candidate in candidates:
        if candidate.is_file():
            content = _json_content(candidate)
            is_custom = isinstance(content, dict) and content.get("kind") == "custom"
            return None if is_custom else tokenizer_from_json(content, str(candidate))
    return None


def tokenizer_from_json(content: Any, where: str) -> Tokenizer:
    """The tokenizer whose to_json() gave this content; `where` it was found, for errors."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "world":
        from rwkvtune.data.tokenizers.world import WorldTokenizer

        return WorldTokenizer()
    if kind == "chars" and isinstance(content.get("characters"), str):
        try:
            return CharTokenizer(content["characters"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if kind == "vocab" and isinstance(content.get("lines"), list):
        from rwkvtune.data.tokenizers.vocabulary import VocabularyTokenizer, parse_vocabulary

        tokens = parse_vocabulary(map(str, content["lines"]), where)
        return VocabularyTokenizer(tokens, int(content.get("vocab_size", 0)))
    if kind == "angles":
        from rwkvtune.data.tokenizers.integers import AngleTokenizer

        return AngleTokenizer()
    if kind == "integers" and isinstance(content.get("max_value"), int):
        from rwkvtune.data.tokenizers.integers import IntegerTokenizer

        return IntegerTokenizer(
            content["max_value"], padded_vocab_size=int(content.get("vocab_size", 0))
        )
    raise UserError(
        f'{where}: no tokenizer of ours: expected {{"kind": "bytes"}}, {{"kind": "world"}}, '
        '{"kind": "chars", "characters": "..."}, {"kind": "vocab", "lines": [...]} or '
        '{"kind": "integers", "max_value": ...}, found '
        f"{str(content)[:60]}."
    )


def _json_content(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(
            f"{path}: not a tokenizer file: {error}. Expected JSON with a `kind`."
        ) from None
