"""Documents from text files: .txt (the file is one), .jsonl (one on each line) and .parquet (one in
each row); the first two also compressed with gzip or zstd.

They are read once, in batches of about a megabyte, whatever the sizes of files and documents. Bytes
are decoded and JSON is parsed only in Batch.documents(), which may run in another process.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from rwkvtune.data.tokenizers.base import utf8
from rwkvtune.data.tokenizers.characters import code_points
from rwkvtune.errors import MissingFileError, UserError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
EXPECTED = ".txt, .jsonl (either also with .gz or .zst after it) or .parquet"

_BATCH_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff".encode()


@dataclass(frozen=True)
class TextFile:
    """A file that can be read, by its name."""

    path: Path
    kind: Literal[".txt", ".jsonl", ".parquet"]
    compression: Literal["", ".gz", ".zst"] = ""

    @staticmethod
    def from_path(path: Path) -> TextFile | None:
        """None when the name ends in nothing that we know."""
        name = path.name.lower()
        for compression in ("", *COMPRESSIONS):
            for kind in KINDS[: 2 if compression else 3]:
                if name.endswith(kind + compression):
                    return TextFile(path, kind, compression)  # type: ignore[arg-type]
        return None


def find_files(names: Sequence[str | os.PathLike[str]]) -> tuple[list[TextFile], list[str]]:
    """The files that names of files, folders and globs stand for, and what to tell about them.

    In the order of the names; those of a folder (with all folders below it) and of a glob sorted by
    path. A file comes once. In folders and globs, names that start with a dot or end in nothing
    that we know are passed over, and counted in a line to be told. Raises MissingFileError or
    UserError for a name that gives no file.
    """
    found: dict[str, TextFile] = {}
    passed_over: list[Path] = []
    repeated: list[Path] = []
    for name in names:
        before = len(found) + len(repeated)
        for path, is_named in dict.fromkeys(_paths_of(os.fspath(name))):
            file = TextFile.from_path(path)
            if is_named and not file:
                raise UserError(f"{path}: the name says no format of ours: expected {EXPECTED}.")
            if not file or (path.name.startswith(".") and not is_named):
                passed_over.append(path)
            elif (real := os.path.realpath(path)) in found:
                repeated.append(path)
            else:
                found[real] = file
        if len(found) + len(repeated) == before:
            raise UserError(f"{name}: no file of text there: expected {EXPECTED}.")
    notes = []
    if passed_over:
        notes.append(f"passed over, hidden or no text by their names: {_some(passed_over)}")
    if repeated:
        notes.append(f"named more than once, used once: {_some(repeated)}")
    return list(found.values()), notes


def _paths_of(name: str) -> Iterator[tuple[Path, bool]]:
    """Paths of files for one name; and whether they were named, rather than found."""
    path = Path(name)
    if name and path.is_dir():
        yield from ((below, False) for below in _files_below(path))
    elif name and path.exists():
        yield path, True
    elif glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise MissingFileError(f"{name}: matches no file.")
        for match in map(Path, matches):
            yield from ((p, False) for p in (_files_below(match) if match.is_dir() else [match]))
    else:
        raise MissingFileError(f"no such file or folder: {name!r}.")


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders below it, and hidden folders themselves, by path. Links
    to folders are followed.
    """
    files: list[Path] = []
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if name not in hidden]
        files += (Path(parent, name) for name in names + hidden)
    return sorted(files)


def _some(paths: Sequence[Path]) -> str:
    shown = ", ".join(str(path) for path in paths[:3])
    return f"{len(paths)} ({shown}{', ...' if paths[3:] else ''})"


class Documents(NamedTuple):
    """The documents of a batch."""

    texts: list[str]
    """Exactly as they are in the files."""

    places: list[str]
    """Of each, for messages."""

    blank_lines: int = 0
    """Passed over."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some documents, or a part of a long one, small enough to be sent to another process."""

    unfinished: bool = False
    """The (last) document goes on in the next batch."""

    read_bytes: int = 0
    """Bytes of the file, as it lies on the disk, that were read for it."""

    byte_order_marks: int = 0
    """Files that begin with one, which is kept as text."""

    def documents(self) -> Documents:
        """Decoded; UserError names what cannot be used."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Texts(Batch):
    """Documents that need at most be decoded."""

    places: list[str]
    contents: Sequence[bytes | str]
    offset: int = 0
    """Byte of its file where the one text begins: a part of a long document."""

    def documents(self) -> Documents:
        texts = [
            content if isinstance(content, str) else _decoded(content, place, self.offset)
            for place, content in zip(self.places, self.contents, strict=True)
        ]
        if self.offset:
            return Documents(texts, [f"{self.places[0]}: in the part from byte {self.offset} on"])
        return Documents(texts, self.places)


@dataclass(frozen=True, kw_only=True)
class JsonLines(Batch):
    """Whole lines of a .jsonl file. Blank lines are no documents."""

    path: Path
    first_line: int
    content: bytes
    key: str

    def documents(self) -> Documents:
        lines: list[str | bytes]
        try:
            lines = [*self.content.decode().split("\n")]
        except UnicodeDecodeError:
            lines = [*self.content.split(b"\n")]  # so that the line can be named
        texts, places = [], []
        for number, line in enumerate(lines, start=self.first_line):
            if line and not line.isspace():
                place = f"{self.path}: line {number}"
                texts.append(_text_of_record(line, place, self.key))
                places.append(place)
        # The end of the last line is no line.
        return Documents(texts, places, blank_lines=len(lines) - (not lines[-1]) - len(texts))


def read_batches(
    files: Sequence[TextFile],
    *,
    key: str,
    last_cut: Callable[[bytes], int],
    cut_at: int = 0,
) -> Iterator[Batch]:
    """All documents of the files, in order.

    key: the field of JSON and the column of Parquet that holds the text.
    last_cut: where a long text may be cut in parts, as Tokenizer.last_cut says.
    cut_at: byte at which the (only) .txt file is cut in two documents; 0: it is one.
    """
    for kind, same_kind in groupby(files, key=lambda file: file.kind):
        if kind == ".txt":
            yield from _together(
                part for file in same_kind for part in _text_parts(file, last_cut, cut_at)
            )
        else:
            read = _json_lines if kind == ".jsonl" else _parquet_rows
            yield from (batch for file in same_kind for batch in read(file, key))


def _together(parts: Iterable[Texts]) -> Iterator[Texts]:
    """The same with small documents in one batch, so that thousands of small files are fast."""
    small: list[Texts] = []
    size = 0
    for part in parts:
        is_whole = not part.offset and not part.unfinished
        if small and (size >= _BATCH_BYTES or not is_whole):
            yield _joined(small)
            small, size = [], 0
        if is_whole:
            small.append(part)
            size += 100 + len(part.contents[0])  # empty files are many at some time, too
        else:
            yield part
    if small:
        yield _joined(small)


def _joined(batches: Sequence[Texts]) -> Texts:
    return Texts(
        places=[place for batch in batches for place in batch.places],
        contents=[content for batch in batches for content in batch.contents],
        read_bytes=sum(batch.read_bytes for batch in batches),
        byte_order_marks=sum(batch.byte_order_marks for batch in batches),
    )


def _text_parts(file: TextFile, last_cut: Callable[[bytes], int], cut_at: int) -> Iterator[Texts]:
    """A .txt file, as one document (or two) in parts."""
    place, offset, was_at = str(file.path), 0, 0
    with _opened(file) as (stream, on_disk):
        for limit in (cut_at, None) if cut_at else (None,):
            window, is_last = b"", False
            while not is_last:
                wanted = max(_BATCH_BYTES, len(window))  # twice as much where there was no cut
                if limit is not None:
                    wanted = min(wanted, limit - offset - len(window))
                more = stream.read(wanted)
                window += more
                is_last = len(more) < wanted or offset + len(window) == limit
                cut = len(window) if is_last else last_cut(window)
                if cut or is_last:
                    position = _position(on_disk)
                    yield Texts(
                        places=[place],
                        contents=[window[:cut]],
                        offset=offset,
                        unfinished=not is_last,
                        read_bytes=position - was_at,
                        byte_order_marks=not offset and window.startswith(_BYTE_ORDER_MARK),
                    )
                    offset, was_at, window = offset + cut, position, window[cut:]


def _json_lines(file: TextFile, key: str) -> Iterator[JsonLines]:
    line, was_at = 1, 0
    with _opened(file) as (stream, on_disk):
        while content := stream.read(_BATCH_BYTES):
            if not content.endswith(b"\n"):
                content += stream.readline()
            position = _position(on_disk)
            count = content.count(b"\n")
            if line == 1:
                content = content.removeprefix(_BYTE_ORDER_MARK)
            yield JsonLines(
                path=file.path,
                first_line=line,
                content=content,
                key=key,
                read_bytes=position - was_at,
            )
            line, was_at = line + count, position


def numbered_lines(file: TextFile) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1 on."""
    with _opened(file) as (stream, _):
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.isspace():
                yield number, line.rstrip(b"\r\n")


def _parquet_rows(file: TextFile, key: str) -> Iterator[Texts]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{file.path}: to read Parquet, install pyarrow: pip install 'rwkvtune[parquet]'."
        ) from None
    with (
        _reading(file.path, pa.ArrowException),
        # Fetched before it is asked for, a whole row group would be held.
        pq.ParquetFile(file.path, buffer_size=_BATCH_BYTES, pre_buffer=False) as parquet,
    ):
        kind = _checked_column(parquet.schema_arrow, key, file.path, pa)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
        num_rows = max(parquet.metadata.num_rows, 1)
        row_bytes = sum(group.total_byte_size for group in groups) // num_rows
        together = min(max(_BATCH_BYTES // max(row_bytes, 1), 1), 8192)
        row, was_at, on_disk = 0, 0, file.path.stat().st_size
        for rows in parquet.iter_batches(together, columns=[key]):
            column = rows.column(0)
            if pa.types.is_dictionary(kind):
                column = column.dictionary_decode()
            contents = column.cast(pa.large_binary()).to_pylist()
            places = [f"{file.path}: row {row + i}" for i in range(1, len(contents) + 1)]
            if None in contents:
                raise UserError(f"{places[contents.index(None)]}: {key} is null, expected text.")
            row += len(contents)
            position = on_disk * row // num_rows
            yield Texts(places=places, contents=contents, read_bytes=position - was_at)
            was_at = position


def _checked_column(schema: Any, key: str, path: Path, pa: Any) -> Any:
    """Type of the column with the text; UserError when it is none of text."""
    if key not in schema.names:
        raise UserError(
            f"{path}: has no column {key!r}; there are {', '.join(schema.names)}. Name the one "
            "with the text by --text_key."
        )
    kind = schema.field(key).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values)):
        raise UserError(f"{path}: column {key!r} is {kind}, expected string.")
    return kind


@dataclass(frozen=True)
class Survey:
    """What a first reading tells."""

    documents: int

    num_characters: int

    characters: str
    """All different ones, by code point."""


def survey(batches: Iterable[Batch], *, until_second: bool = False) -> Survey:
    """Read all documents, or only as many as show that there are several."""
    documents = num_characters = 0
    is_there = np.zeros(0x110000, bool)
    for batch in batches:
        texts, places, _ = batch.documents()
        try:
            codes = code_points("".join(texts))
        except UnicodeEncodeError:
            for text, place in zip(texts, places, strict=True):
                with named(place):
                    utf8(text)
            raise
        is_there[codes] = True
        num_characters += len(codes)
        documents += len(texts) - batch.unfinished
        if until_second and documents > 1:
            break
    characters = "".join(map(chr, np.flatnonzero(is_there)))
    return Survey(documents, num_characters, characters)


@contextmanager
def named(place: str) -> Iterator[None]:
    """Put the place before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def in_two(batches: Iterable[Batch], cut_at: int) -> Iterator[Batch]:
    """The one document of these batches, which holds it whole, cut in two at a character."""
    for batch in batches:
        texts, places, _ = batch.documents()
        for text, place in zip(texts, places, strict=True):
            yield Texts(places=[place, place], contents=[text[:cut_at], text[cut_at:]])


def byte_of_character(file: TextFile, number: int) -> int:
    """Where character `number` (from 0) of a .txt file begins, in bytes of its text."""
    with _opened(file) as (stream, _):
        offset = 0
        while content := stream.read(_BATCH_BYTES):
            begins = np.flatnonzero((np.frombuffer(content, np.uint8) & 0xC0) != 0x80)
            if number < len(begins):
                return offset + int(begins[number])
            number -= len(begins)
            offset += len(content)
    return offset


def _decoded(content: bytes, where: str, offset: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {offset + error.start} ({content[error.start]:#04x}) is not UTF-8 "
            f"({error.reason}). Convert the file to UTF-8."
        ) from None


def json_value(line: bytes | str, where: str) -> Any:
    """What one line of JSON holds; UserError names the place."""
    if isinstance(line, bytes):
        line = _decoded(line, where)
    line = line.strip()  # of Unicode's blanks too, as make_data does; JSON knows only four
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")  # some of its messages end so
        raise UserError(
            f"{where}: not JSON ({reason} at column {error.colno}): {line[:60]!r}."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; depth
        raise UserError(f"{where}: cannot be read as JSON ({error}): {line[:60]!r}.") from None


def _text_of_record(line: bytes | str, where: str, key: str) -> str:
    """The text in one line of JSON."""
    record = json_value(line, where)
    text = record.get(key) if isinstance(record, dict) else None
    if isinstance(text, str):
        return text
    hint = "Each line is one document."
    if isinstance(record, dict) and key not in record and record:
        there = ", ".join(list(record)[:8])
        hint += f" The fields here are {there}: call the one with the text {key!r}"
        hint += " (`rwkvtune data build` takes its name by --text_key)."
    shown = line if isinstance(line, str) else line.decode()
    raise UserError(f'{where}: expected {{"{key}": "..."}}, found {shown[:60]!r}. {hint}')


@contextmanager
def _opened(file: TextFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Its bytes, decompressed; and the file on the disk, which tells how far it was read."""
    with _reading(file.path, *_library_errors(file)), open(file.path, "rb") as on_disk:
        if file.compression == ".gz":
            yield gzip.GzipFile(fileobj=on_disk, mode="rb"), on_disk  # type: ignore[misc]
        elif file.compression == ".zst":
            yield io.BufferedReader(_Zstandard(on_disk), _BATCH_BYTES), on_disk
        else:
            yield on_disk, on_disk


def _position(on_disk: BinaryIO) -> int:
    return on_disk.tell() if on_disk.seekable() else 0  # a named pipe


def _library_errors(file: TextFile) -> tuple[type[Exception], ...]:
    if file.compression != ".zst":
        return ()
    from zstandard import ZstdError

    return (ZstdError,)


class _Zstandard(io.RawIOBase):
    """Decompressed content. Unlike the reader of its library this one does not take a file that was
    cut short for a whole one: EOFError, as from gzip.
    """

    def __init__(self, compressed: BinaryIO) -> None:
        from zstandard import ZstdDecompressor

        self._compressed = compressed
        self._decompressor = ZstdDecompressor(max_window_size=1 << 31)  # as zstd --long=31 needs
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            # Little at a time: a few bytes can stand for a hundred kilobytes.
            self._input = self._input or self._compressed.read(1 << 13)
            if not self._input:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


@contextmanager
def _reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Failures of the disk, and those of the library that reads the file, as UserErrors."""
    known: tuple[type[Exception], ...] = (OSError, zlib.error, *errors)
    try:
        yield
    except EOFError:
        raise UserError(
            f"{path}: ends in the middle of its compressed data. Copy it again."
        ) from None
    except known as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{path}: cannot be read: {reason}.") from error
