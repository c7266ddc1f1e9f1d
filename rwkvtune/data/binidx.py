"""Token files as RWKV programs exchange them: PREFIX.bin (ids only) beside PREFIX.idx (index).

Little endian. The index is Megatron's "MMIDIDX": 9 bytes magic, uint64 version 1, uint8 dtype code,
uint64 number of items n, uint64 number of document-index entries m; then, from byte 34 on and so
not aligned, int32 sizes [n] in tokens, int64 pointers [n] in bytes, int64 document index [m]. We
write one item per document, as RWKV-LM's make_data does: m = n + 1.
"""

from __future__ import annotations

import os
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write_together

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_UINT16_IDS = 65536
_SCAN_BLOCK = 1 << 24  # tokens looked at together: some 30 to 60 MB
_COPIED_TOGETHER = 1 << 16  # documents looked at together while writing
_MAX_DOCUMENT_TOKENS = 2**31 - 1  # sizes are int32

_MAKE_AGAIN = "Copy both files again, or make them again from their text."


def binidx_prefix(path: str | os.PathLike[str]) -> str:
    """The prefix that names a pair of files, from the prefix itself or the name of either file."""
    text = os.fspath(path)
    stem, suffix = os.path.splitext(text)
    named_one_file = suffix in (".bin", ".idx") and not os.path.exists(text + ".idx")
    return stem if named_one_file else text


class BinIdx:
    """Reads a pair of token files: memory-mapped, so opening is cheap; all checks are made here.

    prefix: `data/x`, `data/x.bin` and `data/x.idx` all name data/x.bin with data/x.idx.
    vocab_size: when given, all ids are read once to see that they are below it (uint16 files only
    when it can matter).
    Raises MissingFileError when a file is not there, UserError with file, byte offset and value
    when one is damaged.
    """

    tokens: np.ndarray
    """[num_tokens] uint16 or int32, read-only, on the disk: all documents as one stream."""

    sizes: np.ndarray
    """[n] int32: tokens in each item, which is a document in files of ours and of make_data."""

    doc_index: np.ndarray
    """[m] int64: number of the item with which each document starts, then n."""

    dtype: np.dtype

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int | None = None) -> None:
        self.prefix = binidx_prefix(prefix)
        self.bin_path = Path(self.prefix + ".bin")
        self.idx_path = Path(self.prefix + ".idx")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise _missing(path)
        self.dtype, self.sizes, self.doc_index = _read_index(self.idx_path)
        self.tokens = self._map_tokens()
        if vocab_size is not None:
            self.check_ids(vocab_size)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def check_ids(self, vocab_size: int) -> None:
        """Raise UserError when an id is not in [0, vocab_size). Reads the file once, in blocks."""
        if self.dtype.itemsize == 2 and vocab_size >= _UINT16_IDS:
            return
        for block_start in range(0, len(self.tokens), _SCAN_BLOCK):
            block = self.tokens[block_start : block_start + _SCAN_BLOCK]
            if block.min() < 0 or block.max() >= vocab_size:
                position = block_start + int(np.argmax((block < 0) | (block >= vocab_size)))
                raise UserError(
                    f"{self.bin_path}: byte {position * self.dtype.itemsize} (token {position}): "
                    f"id {self.tokens[position]} is not in the vocabulary of {vocab_size} ids. "
                    f"The largest id in the file is {self.tokens.max()}: use the vocabulary size "
                    "of the tokenizer that wrote it, or write it again with the right tokenizer."
                )

    def _map_tokens(self) -> np.ndarray:
        expected = int(self.sizes.sum(dtype=np.int64))
        found_bytes = self.bin_path.stat().st_size
        if found_bytes != expected * self.dtype.itemsize:
            raise UserError(
                f"{self.bin_path}: ends at byte {found_bytes}, but {self.idx_path.name} describes "
                f"{expected * self.dtype.itemsize} bytes ({expected} tokens of "
                f"{self.dtype.itemsize} bytes). The two files do not belong together or a copy was "
                f"cut short. {_MAKE_AGAIN}"
            )
        if expected == 0:
            raise UserError(
                f"{self.bin_path}: holds 0 tokens; nothing can be read from it. {_MAKE_AGAIN}"
            )
        # A plain array: slicing numpy's memmap class costs several microseconds more each time.
        return np.asarray(np.memmap(self.bin_path, self.dtype, mode="r"))


class TokenSpool:
    """Documents on their way into token files, in a file without a name, of which not even kill -9
    leaves anything.

        with TokenSpool("data/x", vocab_size=65536) as spool:
            spool.add_document(ids)
            atomic_write_together(spool.pair("data/x"))

    prefix: of the files that it is for; it lies in their folder. Ids are stored as uint16, or as
    int32 when vocab_size is above 65536. No end-of-document token is added.
    """

    sizes: array[int]
    """Tokens of each document, int32."""

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        if not 1 <= vocab_size <= 2**31:
            raise UserError(
                f"vocab_size={vocab_size} does not fit a token file: need 1 to {2**31}."
            )
        self.prefix = binidx_prefix(prefix)
        self.vocab_size = vocab_size
        self.sizes = array("i")
        self.dtype = token_dtype(vocab_size)
        self._unfinished = False
        self._file: BinaryIO | None = None

    def __enter__(self) -> TokenSpool:
        folder = Path(self.prefix).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}. Choose a folder in which this user "
                "may write."
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a full disk, which was told when it was written to
                self._file.close()

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document; UserError, with its place, for an id beyond the vocabulary."""
        self.add_documents(np.asarray(ids, np.int64 if len(ids) == 0 else None), [len(ids)])

    def add_documents(
        self, ids: np.ndarray, sizes: Sequence[int] | np.ndarray, *, unfinished: bool = False
    ) -> None:
        """Append several: their ids one after the other, and how many belong to each.

        unfinished: the last goes on with the first of the next call.
        """
        assert self._file is not None, "used in a with block"
        assert ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids) == np.sum(sizes), ids.dtype
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            position = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            ends = np.cumsum(sizes)
            number = int(np.searchsorted(ends, position, side="right"))
            position_in_it = position - int(ends[number] - sizes[number])
            raise UserError(
                f"document {len(self.sizes) + number}, token {position_in_it}: "
                f"id {ids[position]} is not in the vocabulary of {self.vocab_size} ids for "
                f"{self.prefix}.bin. Give the vocab_size of the tokenizer that made the ids."
            )
        added = np.array(sizes, np.int64)
        if self._unfinished:
            added[0] += self.sizes[-1]
        if len(added) and added.max() > _MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"document {len(self.sizes)} or one after it has {added.max()} tokens or more; the "
                f"index of {self.prefix} can hold {_MAX_DOCUMENT_TOKENS} per document. Split it."
            )
        try:
            self._file.write(ids.astype(self.dtype, copy=False).tobytes())
        except OSError as error:
            raise UserError(
                f"cannot write {self.prefix}.bin: {error.strerror}. Nothing was changed: make room "
                "or choose another folder (twice the size of the finished file is needed for a "
                "moment)."
            ) from error
        if self._unfinished:
            self.sizes.pop()
        self.sizes.frombytes(added.astype("i").tobytes())
        self._unfinished = unfinished

    def pair(
        self, prefix: str, order: Iterable[np.ndarray] | None = None
    ) -> dict[Path, Callable[[BinaryIO], object]]:
        """What atomic_write_together needs to write PREFIX.bin and PREFIX.idx.

        order: numbers of the documents, int64 arrays to be written one after the other, where a
        number may come any number of times; None: all, in the order in which they were added.
        """
        written = array("i")
        arrays = [np.arange(len(self.sizes))] if order is None else order

        def write_tokens(file: BinaryIO) -> None:
            for documents in arrays:
                self._copy(documents, file)
                written.frombytes(np.frombuffer(self.sizes, "i").take(documents).tobytes())

        def write_index(file: BinaryIO) -> None:
            _write_index(file, self.dtype, np.frombuffer(written, "i"))

        return {Path(f"{prefix}.bin"): write_tokens, Path(f"{prefix}.idx"): write_index}

    def _copy(self, documents: np.ndarray, file: BinaryIO) -> None:
        """Write the tokens of these documents."""
        assert self._file is not None
        self._file.flush()
        all_sizes = np.frombuffer(self.sizes, "i")
        all_ends = np.cumsum(all_sizes, dtype=np.int64)
        # Not mapped into memory: pages of a mapped file count as memory of the process.
        with open(self._file.fileno(), "rb", buffering=0, closefd=False) as spool:
            for i in range(0, len(documents), _COPIED_TOGETHER):
                block = documents[i : i + _COPIED_TOGETHER]
                ends = all_ends.take(block)
                begins = ends - all_sizes.take(block)
                is_first = np.append(True, begins[1:] != ends[:-1])  # of neighbours, read at once
                is_last = np.append(is_first[1:], True)
                for begin, end in zip(begins[is_first], ends[is_last], strict=True):
                    spool.seek(int(begin) * self.dtype.itemsize)
                    left = int(end - begin) * self.dtype.itemsize
                    while left:
                        part = spool.read(min(left, 1 << 20))
                        assert part, "the spool ends before its last document"
                        file.write(part)
                        left -= len(part)


class BinIdxWriter(TokenSpool):
    """Writes a pair of token files, one item per document.

        with BinIdxWriter("data/x", vocab_size=65536) as writer:
            writer.add_document(ids)

    Both files get their names when the block ends without an error; until then nothing is there,
    whatever happens.
    """

    def __enter__(self) -> BinIdxWriter:
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            super().__exit__(kind, value, traceback)

    def _finish(self) -> None:
        if not any(self.sizes):
            raise UserError(
                f"no tokens to write into {self.prefix}.bin: all {len(self.sizes)} documents are "
                "empty."
            )
        atomic_write_together(self.pair(self.prefix))


def token_dtype(vocab_size: int) -> np.dtype:
    """How ids of such a vocabulary are stored."""
    return _DTYPES[8 if vocab_size <= _UINT16_IDS else 4]


def _write_index(file: BinaryIO, dtype: np.dtype, sizes: np.ndarray) -> None:
    """The whole index, from the int32 sizes of items that are one document each."""
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(sizes), len(sizes) + 1))
    file.write(sizes.astype("<i4").tobytes())
    begin = 0
    for i in range(0, len(sizes), _COPIED_TOGETHER):
        block = sizes[i : i + _COPIED_TOGETHER].astype(np.int64)
        ends = begin + np.cumsum(block)
        file.write(((ends - block) * dtype.itemsize).astype("<i8").tobytes())
        begin = int(ends[-1])
    for i in range(0, len(sizes) + 1, _COPIED_TOGETHER):
        end = min(i + _COPIED_TOGETHER, len(sizes) + 1)
        file.write(np.arange(i, end, dtype="<i8").tobytes())


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """dtype of the ids, sizes [n] int32, document index [m] int64; checked against each other."""
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
        num_bytes = os.fstat(file.fileno()).st_size
        if header[:9] != _MAGIC[: len(header)]:
            raise UserError(
                f"{path}: byte 0: found {header[:9]!r}, expected {_MAGIC!r}. This is not the index "
                "of a token file."
            )
        if len(header) < _HEADER.size:
            raise UserError(
                f"{path}: ends at byte {len(header)}, inside the header of {_HEADER.size} bytes. "
                f"{_MAKE_AGAIN}"
            )
        _, version, code, num_items, num_doc_entries = _HEADER.unpack(header)
        if version != _VERSION:
            raise UserError(
                f"{path}: byte 9: version {version}, expected {_VERSION}. {_MAKE_AGAIN}"
            )
        if code not in _DTYPES:
            raise UserError(
                f"{path}: byte 17: dtype code {code}, expected 8 (uint16) or 4 (int32). "
                "Write the tokens again with one of these."
            )
        expected_bytes = _HEADER.size + 12 * num_items + 8 * num_doc_entries
        if num_bytes != expected_bytes:
            raise UserError(
                f"{path}: ends at byte {num_bytes}, expected {expected_bytes} for the {num_items} "
                f"items (byte 18) and {num_doc_entries} document-index entries (byte 26) that it "
                f"announces. {_MAKE_AGAIN}"
            )
        sizes = np.frombuffer(file.read(4 * num_items), "<i4")
        pointers = np.frombuffer(file.read(8 * num_items), "<i8")
        doc_index = np.frombuffer(file.read(8 * num_doc_entries), "<i8")

    dtype = _DTYPES[code]
    pointers_at = _HEADER.size + 4 * num_items
    doc_index_at = pointers_at + 8 * num_items
    ends = np.cumsum(sizes, dtype=np.int64) * dtype.itemsize
    expected_pointers = (
        np.concatenate((np.zeros(1, np.int64), ends[:-1])) if num_items else pointers
    )
    _require(path, "size of item", sizes, sizes >= 0, _HEADER.size, "0 or more")
    _require(
        path,
        "pointer of item",
        pointers,
        pointers == expected_pointers,
        pointers_at,
        expected_pointers,
    )
    in_order = (doc_index >= 0) & (doc_index <= num_items)
    in_order[1:] &= doc_index[1:] >= doc_index[:-1]
    _require(
        path,
        "document-index entry",
        doc_index,
        in_order,
        doc_index_at,
        f"rising from 0 to {num_items}",
    )
    return dtype, sizes, doc_index


def _require(
    path: Path,
    what: str,
    values: np.ndarray,
    is_good: np.ndarray,
    at: int,
    expected: np.ndarray | str,
) -> None:
    """Raise UserError for the first value that is not good; `at`: byte where the values begin."""
    if is_good.all():
        return
    first = int(np.argmin(is_good))
    wanted = expected if isinstance(expected, str) else expected[first]
    raise UserError(
        f"{path}: byte {at + first * values.itemsize}: {what} {first} is {values[first]}, expected "
        f"{wanted}. {_MAKE_AGAIN}"
    )


def _missing(path: Path) -> MissingFileError:
    there = sorted(
        found.stem for found in path.parent.glob("*.idx") if found.with_suffix(".bin").exists()
    )
    if not path.parent.is_dir():
        hint = f"The folder {path.parent} does not exist."
    elif there:
        names = ", ".join(there[:8]) + (", ..." if there[8:] else "")
        hint = f"Pairs of token files in {path.parent}: {names}."
    else:
        hint = f"{path.parent} holds no pair of token files (.bin with .idx)."
    return MissingFileError(
        f"no such file: {path}. {hint} Give the common prefix of an existing pair."
    )
