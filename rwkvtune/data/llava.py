"""Conversations in LLaVA's format, read as a stream: chat.json (one array), chat.jsonl (one object
a line), and the way from the first to the second.

    {"id": "...", "image": "a.jpg", "conversations": [{"from": "human", "value": "..."}, ...]}
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rwkvtune.data.images import PictureStore
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write

BLOCK_BYTES = 1 << 20
HEAD_BYTES = 1 << 20
"""Of a file, by which its form is told."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """Where a record's JSON stands in its file, in bytes."""

    start: int
    length: int


class RecordFile:
    """The records of a file by their number, each read and parsed when it is asked for.

    Holds 16 bytes per record. Several threads may read at once.
    UserError when the file is no list of JSON objects.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        places = [place for place, _ in stream_records(self.path)]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)
        self._file = open(self.path, "rb")  # noqa: SIM115 - open as long as this object lives

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        start, length = self._places[number].tolist()
        record: dict[str, Any] = json.loads(os.pread(self._file.fileno(), length, start))
        return record


def stream_records(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every record of a JSON array, of the first list inside one JSON object, or of JSON lines,
    with its place; a file of any size costs the memory of one block.

    MissingFileError, or UserError that says where the file is damaged.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        if _is_json_lines(path, file):
            yield from _lines(path, file)
            return
        scanner = _Scanner(path, file)
        is_wrapped = scanner.peek() == "{"
        if is_wrapped:
            _go_to_first_list(scanner)
        for place, value in _array(scanner):
            yield place, _checked(value, f"{path}: the item at byte {place.start:,}")
        if not is_wrapped:
            scanner.take("")


def _is_json_lines(path: Path, file: BinaryIO) -> bool:
    """Told from the first line: a whole object that is no wrapper around a list of records."""
    head = file.read(HEAD_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    file.seek(0)
    if not head.startswith(b"{"):
        return False
    if path.suffix == ".jsonl":
        return True
    try:
        first = json.loads(head.partition(b"\n")[0])
    except ValueError:
        return False
    return "conversations" in first


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[Place, dict[str, Any]]]:
    start = 0
    for number, line in enumerate(file, 1):
        place = Place(start, len(line))
        start += len(line)
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            place = Place(len(BYTE_ORDER_MARK), len(line) - len(BYTE_ORDER_MARK))
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON: {error}") from None
        yield place, _checked(value, f"{path}: line {number}")


def _checked(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object: expected a record, found {str(value)[:60]!r}")
    return value


def _go_to_first_list(scanner: _Scanner) -> None:
    scanner.take("{")
    while scanner.peek() != "}":
        scanner.value()
        scanner.take(":")
        if scanner.peek() == "[":
            return
        scanner.value()
        if scanner.peek() == ",":
            scanner.take(",")
    raise UserError(
        f"{scanner.path} is one JSON object without a list in it: expected an array of records, an "
        "object that holds one, or a record per line"
    )


def _array(scanner: _Scanner) -> Iterator[tuple[Place, Any]]:
    scanner.take("[")
    while scanner.peek() != "]":
        yield scanner.value()
        if scanner.peek() != "]":
            scanner.take(",")
    scanner.take("]")


class _Scanner:
    """JSON values of a file one after the other."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at = "", 0
        self._byte = 0
        """Of the file, at `_at`."""
        self._is_at_end = False
        if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            self._byte = len(BYTE_ORDER_MARK)
        else:
            file.seek(0)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and rest not in " \t\r\n":
                return rest
            if rest:
                self._at += 1
                self._byte += 1
            elif not self._read():
                return ""

    def take(self, character: str) -> None:
        """Go past a character, or nowhere where "" is the end of the file; else UserError."""
        found = self.peek()
        if found != character:
            wanted = repr(character) if character else "the end of the file"
            raise self._damaged(f"expected {wanted}, found {found!r}")
        self._at += len(character)
        self._byte += len(character)

    def value(self) -> tuple[Place, Any]:
        """The next value, read whole, and its place."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._read():
                    continue
                raise self._damaged(error.msg) from None
            if end == len(self._text) and self._read():  # a number may go on in the next block
                continue
            piece = self._text[self._at : end]
            place = Place(self._byte, len(piece) if piece.isascii() else len(piece.encode()))
            self._at, self._byte = end, self._byte + place.length
            return place, value

    def _read(self) -> bool:
        """Add a block; False at the end of the file."""
        if self._is_at_end:
            return False
        # As much again as is there: a value longer than a block must not be tried block by block.
        block = self._file.read(max(BLOCK_BYTES, len(self._text) - self._at))
        self._is_at_end = not block
        try:
            more = self._decode(block, final=self._is_at_end)
        except UnicodeDecodeError as error:
            raise self._damaged(f"not UTF-8 ({error.reason})") from None
        self._text, self._at = self._text[self._at :] + more, 0
        return True

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is damaged near byte {self._byte:,}: {reason}")


_DECODER = json.JSONDecoder()


@dataclass
class Conversion:
    records: int = 0
    pictures: int = 0
    """Names of pictures in the records."""
    missing: int = 0
    """Those that were looked for and are not there."""
    first_missing: list[str] = field(default_factory=list)


def convert_to_lines(source: Path, target: Path, *, pictures_in: Path | None = None) -> Conversion:
    """Write the records of `source` to `target`, one JSON object a line, UTF-8, in their order;
    whole or not at all. The same source gives the same bytes.

    pictures_in: folder in which to look for the pictures (its images.zip included); None = nowhere.
    """
    if target.exists() and target.samefile(source):
        raise UserError(f"{source} would be replaced by its own conversion: give another output")
    result = Conversion()
    store = None if pictures_in is None else PictureStore(pictures_in)

    def write(file: BinaryIO) -> None:
        for _, record in stream_records(source):
            file.write(_as_line(record))
            result.records += 1
            for name in picture_names(record):
                result.pictures += 1
                if store is not None and store.find(name) is None:
                    result.missing += 1
                    if len(result.first_missing) < 10:
                        result.first_missing.append(name)

    atomic_write(target, write)
    return result


def _as_line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(record).encode() + b"\n"


def picture_names(record: dict[str, Any]) -> list[str]:
    """Of one record, which names none, one ("image": "a.jpg") or several ("image": ["a.jpg", ...]).

    UserError when the field holds something else.
    """
    found = record.get("image", record.get("images"))
    if found is None or found == "":
        return []
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"image is {str(found)[:60]!r}: expected a file name or a list of them")
    return names


def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """LLaVA's entry to its training data: see `llava_dataset.make_supervised_data_module`."""
    from rwkvtune.data import llava_dataset  # needs torch

    return llava_dataset.make_supervised_data_module(tokenizer, data_args)
