"""Vocabulary files in RWKV's format, and the tokenizers they make.

A line is `<id> <Python literal of a str or bytes> <length in bytes>`; a str stands for its UTF-8
bytes. Ids may have gaps. Blank lines and what follows a `#` are comments. Text is cut from its
start, always taking the longest token that fits. The matching is done by pyrwkv-tokenizer (Rust).
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT, MatchedTokenizer
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write

_NO_TOKEN = "\N{REPLACEMENT CHARACTER}".encode()

_LINE = re.compile(
    r"""\s*(?P<id>\d+)\s+(?P<literal>(?P<prefix>[A-Za-z]{0,2})
    (?:'(?P<single>(?:[^'\\]|\\.)*)'|"(?P<double>(?:[^"\\]|\\.)*)"))
    \s+(?P<length>\d+)\s*(?:\#.*)?""",
    re.VERBOSE | re.DOTALL,
)

MAX_ID = (1 << 24) - 1  # a table, and a model, has a row for each id up to the largest
_MAX_TOKENS = _MAX_TOKEN_BYTES = 65535  # pyrwkv-tokenizer counts both in 16 bits


class VocabularyTokenizer(MatchedTokenizer):
    """The tokenizer of a vocabulary file.

    tokens: id -> bytes, as read_vocabulary gives them.
    vocab_size: 0 = the largest id + 1; or more, for models that have more rows.
    """

    name = "vocab"

    def __init__(self, tokens: Mapping[int, bytes], vocab_size: int = 0) -> None:
        self.tokens = dict(sorted(tokens.items()))
        table, self.unused_ids = table_of(self.tokens, padded(max(self.tokens) + 1, vocab_size))
        super().__init__(table)
        self._matcher: Matcher | None = None

    def _append_ids(self, ids: array[int], text: str, encoded: bytes) -> None:
        if self._matcher is None:  # for decoding alone it would take time and memory for nothing
            self._matcher = Matcher(self.tokens.values())
            self._id_of_number = np.array([END_OF_DOCUMENT, *self.tokens], np.uint32)
        numbers = np.frombuffer(array("I", self._matcher.numbers(text)), np.uint32)
        ids.frombytes(self._id_of_number.take(numbers).tobytes())

    def _lossy(self, encoded: bytes, decoded: bytes) -> UserError:
        if not encoded.startswith(decoded):
            return super()._lossy(encoded, decoded)
        position = len(decoded)
        around = encoded[max(position - 20, 0) : position + 20].decode(errors="replace")
        return UserError(
            f"no token of the vocabulary fits at byte {position} of the text "
            f"({encoded[position]:#04x}, in {around!r}). Add a token for that byte to the "
            "vocabulary file, or take it out of the text."
        )

    def to_json(self) -> dict[str, Any]:
        lines = vocabulary_lines(self.tokens)
        return {"kind": self.name, "vocab_size": self.vocab_size, "lines": lines}


class Matcher:
    """The longest tokens that fit one after the other, by pyrwkv-tokenizer, whose own vocabulary
    file this class writes for it.

    tokens: at most 65535, and none longer than 65535 bytes. They are numbered from 1.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.txt"
            with open(path, "w", encoding="ascii") as file:
                for number, token in enumerate(tokens, start=1):
                    # Of bytes literals it understands nothing but \x..
                    literal = "".join(f"\\x{byte:02x}" for byte in token)
                    file.write(f"{number} b'{literal}' {len(token)}\n")
            self._rust = rust_tokenizer(str(path))

    def numbers(self, text: str) -> list[int]:
        """Numbers of the tokens up to the place where none fits."""
        return rust_encode(self._rust, text)


def rust_tokenizer(path: str | None = None) -> Any:
    """pyrwkv-tokenizer with a vocabulary file that is in order, or with the World vocabulary that
    it brings."""
    from pyrwkv_tokenizer import RWKVTokenizer

    return RWKVTokenizer(vocab_filepath=path)


def rust_encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text up to the first byte that no token fits, where the library stops and says
    nothing; its panics as UserError."""
    try:
        ids: list[int] = tokenizer.encode(text)
    except BaseException as error:
        # Rust's panics are no Exception, so that `except Exception` lets them through.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"pyrwkv-tokenizer failed on this text: {error}") from None
    return ids


def read_vocabulary(path: str | os.PathLike[str]) -> dict[int, bytes]:
    """Tokens of a vocabulary file by id; UserError that names the line that cannot be used."""
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"no such file: {path}. Give the path of a vocabulary.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}): not a vocabulary file."
        ) from None
    return parse_vocabulary(content.split("\n"), str(path))


def parse_vocabulary(lines: Iterable[str], where: str) -> dict[int, bytes]:
    """Tokens by id, from lines of a vocabulary file; `where` names it in errors.

    Id 0 may be there as '' or as the byte 0, as some programs write it; it stays the end of a
    document and stands for no text.
    """
    tokens: dict[int, bytes] = {}
    line_of_id: dict[int, int] = {}
    line_of_token: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        here = f"{where}: line {number}"
        id, token = _parse_line(stripped, here)
        if id in line_of_id:
            raise UserError(f"{here}: id {id} was given in line {line_of_id[id]} already.")
        line_of_id[id] = number
        if id == END_OF_DOCUMENT:
            if token not in (b"", b"\0"):
                raise UserError(
                    f"{here}: id 0 ends a document and cannot stand for text ({token[:40]!r}). "
                    "Number the tokens from 1."
                )
            continue
        if not token:
            raise UserError(f"{here}: the token of id {id} is empty. Leave the line out.")
        if token in line_of_token:
            raise UserError(
                f"{here}: the token {token[:40]!r} was given in line {line_of_token[token]} "
                "already, with another id."
            )
        line_of_token[token] = number
        tokens[id] = token
    if not tokens:
        raise UserError(
            f"{where}: holds no tokens. Expected lines `<id> <Python string> <length in bytes>`, "
            "such as: 1 'a' 1"
        )
    if len(tokens) > _MAX_TOKENS:
        raise UserError(f"{where}: holds {len(tokens)} tokens; at most {_MAX_TOKENS} are possible.")
    return tokens


def _parse_line(line: str, here: str) -> tuple[int, bytes]:
    parts = _LINE.fullmatch(line)
    if not parts:
        raise UserError(
            f"{here}: expected `<id> <Python string> <length in bytes>`, such as: 1 'a' 1; found "
            f"{line[:60]!r}."
        )
    id, length = int(parts["id"]), int(parts["length"])
    token = _literal(parts, here)
    if id > MAX_ID:
        raise UserError(f"{here}: id {id} is too large: expected at most {MAX_ID}.")
    if len(token) != length:
        raise UserError(
            f"{here}: {line[:60]!r}: the token has {len(token)} bytes in UTF-8, but the line says "
            f"{length}. Correct the line."
        )
    if length > _MAX_TOKEN_BYTES:
        raise UserError(f"{here}: a token has at most {_MAX_TOKEN_BYTES} bytes; this has {length}.")
    return id, token


def _literal(parts: re.Match[str], here: str) -> bytes:
    """The bytes that a Python literal stands for."""
    plain = parts["double"] if parts["single"] is None else parts["single"]
    try:
        # Most lines have no escapes; the parser takes ten times as long.
        is_plain = not parts["prefix"] and "\\" not in plain
        value = plain if is_plain else ast.literal_eval(parts["literal"])
        return value.encode() if isinstance(value, str) else bytes(value)
    except (ValueError, SyntaxError) as error:  # half a surrogate pair among them
        raise UserError(
            f"{here}: {parts['literal'][:60]} is no Python string of Unicode text or bytes "
            f"({error})."
        ) from None


def table_of(tokens: Mapping[int, bytes], num_rows: int) -> tuple[list[bytes], list[int]]:
    """The bytes of ids 0 to num_rows - 1, and the ids that stand for no text (they decode to
    U+FFFD).
    """
    unused = [id for id in range(1, num_rows) if id not in tokens]
    return [b"", *(tokens.get(id, _NO_TOKEN) for id in range(1, num_rows))], unused


def padded(needed: int, wanted: int) -> int:
    """Rows of a model: as many as are wanted, 0 = as are needed; UserError for fewer, or for what
    is no number of rows."""
    if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer) or wanted > MAX_ID + 1:
        raise UserError(
            f"padded_vocab_size={wanted!r} must be a whole number of at most {MAX_ID + 1}"
        )
    if wanted and wanted < needed:
        raise UserError(
            f"padded_vocab_size={wanted} is less than the {needed} ids that the vocabulary needs "
            "(its largest id + 1): give that number or more, or 0"
        )
    return int(wanted) or needed


def save_vocabulary(tokens: Mapping[int, bytes], path: str | os.PathLike[str]) -> None:
    """Write a vocabulary file, whole or not at all, with id 0 as other programs expect it."""
    lines = ["0 b'\\x00' 1", *vocabulary_lines(tokens)]
    content = "".join(line + "\n" for line in lines).encode()
    atomic_write(path, lambda file: file.write(content))


def vocabulary_lines(tokens: Mapping[int, bytes]) -> list[str]:
    """Lines of a vocabulary file, which parse_vocabulary reads."""
    lines = []
    for id, token in tokens.items():
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{id} {literal} {len(token)}")
    return lines


def is_world_vocabulary(path: str | os.PathLike[str]) -> bool:
    """Whether the file is rwkv_vocab_v20230424, with either kind of line ends."""
    content = Path(path).read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha256(content).hexdigest() == _WORLD_SHA256


_WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
