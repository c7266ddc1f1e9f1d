"""Token files as RWKV programs exchange them: PREFIX.bin (ids only) beside PREFIX.idx (index).

Little endian. The index is Megatron's "MMIDIDX": 9 bytes magic, uint64 version 1, uint8 dtype code,
uint64 number of items n, uint64 number of document-index entries m; then, from byte 34 on and so
not aligned, int32 sizes [n] in tokens, int64 pointers [n] in bytes, int64 document index [m]. We
write one item per document, as RWKV-LM's make_data does: m = n + 1.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_UINT16_IDS = 65536
_SCAN_BLOCK = 1 << 24  # tokens looked at together: some 30 to 60 MB
_MAX_ITEM_TOKENS = 2**31 - 1  # sizes are int32

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


class BinIdxWriter:
    """Writes a pair of token files, one item per document.

        with BinIdxWriter("data/x", vocab_size=65536) as writer:
            writer.add_document(ids)

    Both files get their names when the block ends without an error; until then nothing is there,
    whatever happens. Ids are stored as uint16, or as int32 when vocab_size is above 65536. The
    writer adds no end-of-document token.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        if not 1 <= vocab_size <= 2**31:
            raise UserError(
                f"vocab_size={vocab_size} does not fit a token file: need 1 to {2**31}."
            )
        self.prefix = binidx_prefix(prefix)
        self.vocab_size = vocab_size
        self._code = 8 if vocab_size <= _UINT16_IDS else 4
        self._dtype = _DTYPES[self._code]
        self._sizes = array("i")
        self._spool: BinaryIO | None = None

    def __enter__(self) -> BinIdxWriter:
        folder = Path(self.prefix).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # It has no name, so that not even kill -9 leaves it behind.
            self._spool = tempfile.TemporaryFile(dir=folder)
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}. Choose a folder in which this user "
                "may write."
            ) from error
        return self

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document; UserError, with its place, for an id beyond the vocabulary."""
        assert self._spool is not None, "BinIdxWriter is used in a with block"
        document = np.asarray(ids, dtype=np.int64 if len(ids) == 0 else None)
        assert document.ndim == 1 and document.dtype.kind in "iu", (document.shape, document.dtype)
        if len(document) and (document.min() < 0 or document.max() >= self.vocab_size):
            position = int(np.argmax((document < 0) | (document >= self.vocab_size)))
            raise UserError(
                f"document {len(self._sizes)}, token {position}: id {document[position]} is not in "
                f"the vocabulary of {self.vocab_size} ids for {self.prefix}.bin. Give the "
                "vocab_size of the tokenizer that made the ids."
            )
        if len(document) > _MAX_ITEM_TOKENS:
            raise UserError(
                f"document {len(self._sizes)} has {len(document)} tokens; the index of "
                f"{self.prefix} can hold {_MAX_ITEM_TOKENS} per document. Split it."
            )
        try:
            self._spool.write(document.astype(self._dtype).tobytes())
        except OSError as error:
            raise UserError(
                f"cannot write {self.prefix}.bin: {error.strerror}. Nothing was changed: make room "
                "or choose another folder (twice the size of the finished file is needed for a "
                "moment)."
            ) from error
        self._sizes.append(len(document))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._spool is not None
        with self._spool as spool:
            if kind is None:
                self._finish(spool)

    def _finish(self, spool: BinaryIO) -> None:
        sizes = np.asarray(self._sizes, dtype="<i4")
        if not sizes.sum(dtype=np.int64):
            raise UserError(
                f"no tokens to write into {self.prefix}.bin: all {len(sizes)} documents are empty."
            )
        ends = np.cumsum(sizes, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate(([0], ends[:-1])).astype("<i8")
        doc_index = np.arange(len(sizes) + 1, dtype="<i8")

        def write_index(file: BinaryIO) -> None:
            file.write(_HEADER.pack(_MAGIC, _VERSION, self._code, len(sizes), len(doc_index)))
            for part in (sizes, pointers, doc_index):
                file.write(part.tobytes())

        def write_tokens(file: BinaryIO) -> None:
            spool.seek(0)
            shutil.copyfileobj(spool, file, 1 << 20)
            file.flush()
            # From here to the end a crash leaves a .bin without index, which nobody takes for a
            # pair; a new .bin with the old index could be.
            Path(self.prefix + ".idx").unlink(missing_ok=True)

        atomic_write(self.prefix + ".bin", write_tokens)
        atomic_write(self.prefix + ".idx", write_index)


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
