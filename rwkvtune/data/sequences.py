"""From sequences of numbers, or lines of JSON, to token files: NAME.jsonl, NAME.bin with NAME.idx,
and vocab.txt.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkvtune.data.binidx import BinIdx
from rwkvtune.data.build import Built, build_token_files
from rwkvtune.data.sampler import magic_prime
from rwkvtune.data.tokenizers import Tokenizer, load_tokenizer
from rwkvtune.data.tokenizers.custom import BaseTokenizer
from rwkvtune.data.tokenizers.integers import IntegerTokenizer, whole_number
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write

SHUFFLE_SEED = 42
"""Where nobody gives one: the same data make the same files."""


@dataclass(frozen=True)
class Sequences:
    """Numbers in rows, checked."""

    rows: Sequence[np.ndarray]
    """[row_length] each, maybe of different lengths."""
    cut_from: int
    """1-D data were cut into rows of this length; 0 = they came in rows."""

    def place(self, row: int, position: int) -> str:
        if self.cut_from:
            return f"at index {row * self.cut_from + position}"
        return f"in row {row}, position {position}"

    def texts(self) -> Iterator[str]:
        """Each row as the tokenizers take it: values with blanks between them."""
        return (" ".join(map(str, row.tolist())) for row in self.rows)

    def check_fits(self, tokenizer: Tokenizer) -> None:
        """UserError for the first value that the tokenizer has no id for."""
        if not isinstance(tokenizer, IntegerTokenizer):
            for number, text in enumerate(self.texts()):
                try:
                    tokenizer.encode(text)
                except UserError as error:
                    raise UserError(f"row {number} of the data: {error}") from None
            return
        for number, row in enumerate(self.rows):
            if len(row) and (row.min() < 0 or row.max() > tokenizer.max_value):
                position = int(np.argmax((row < 0) | (row > tokenizer.max_value)))
                largest = max(int(other.max()) for other in self.rows if len(other))
                where = self.place(number, position)
                raise UserError(tokenizer.out_of_range(int(row[position]), where, largest))


def sequences_of(
    data: Any, sequence_length: int | None = None, *, whole_numbers: bool = True
) -> Sequences:
    """Rows of an array or of a list of rows; UserError, with the place of the value, for what is
    none or no whole number.

    data: [num_sequences, length] or [num_values] of any integer type, floats that are whole
    numbers, or a list of rows of any lengths. 1-D data are cut into rows of sequence_length; what
    remains is a last, shorter row. None keeps them in one.
    whole_numbers: False takes values of any kind, for a transform of the user's own.
    """
    if sequence_length is not None and not (whole_number(sequence_length) or 0) >= 1:
        raise UserError(f"sequence_length={sequence_length!r} must be a whole number from 1 up")
    array, is_ragged = _as_array(data)
    if array.size == 0:
        raise UserError(f"the data are empty (shape {array.shape}): give at least one value")
    cut_from = 0
    rows: Sequence[np.ndarray] = list(array)
    if array.ndim == 1 and not is_ragged:
        cut_from = min(sequence_length or len(array), len(array))
        rows = [array[i : i + cut_from] for i in range(0, len(array), cut_from)]
    found = Sequences(rows, cut_from)
    return Sequences(_whole(found), cut_from) if whole_numbers else found


def _as_array(data: Any) -> tuple[np.ndarray, bool]:
    """The data as an array of one or two axes; or of one axis whose values are rows, and True."""
    expected = "expected an array [sequences, length] or [values], or a list of rows"
    if isinstance(data, str | os.PathLike):
        raise UserError(
            f"the data are the text {os.fspath(data)!r}: {expected}. What is in a file is taken by "
            "prepare_data_from_file (.npy) or prepare_data_from_jsonl"
        )
    if isinstance(data, np.ma.MaskedArray) and np.ma.is_masked(data):
        raise UserError(
            f"the data are an array with {np.ma.count_masked(data)} masked values, which would "
            "count like the others: give the rows without them, "
            "[row.compressed() for row in data]"
        )
    try:
        array = np.asarray(data)
        has_rows = array.dtype == object and array.ndim == 1 and any(map(np.ndim, array))
    except ValueError:  # rows of different lengths
        has_rows = True
    except (TypeError, RuntimeError) as error:  # a tensor on a GPU, or one with gradients
        raise UserError(f"the data are no array ({error}): {expected}") from None
    if not has_rows:
        if array.ndim not in (1, 2):
            raise UserError(f"the data have the shape {array.shape}: {expected}")
        return array, False
    rows = np.empty(len(data), object)
    for number, row in enumerate(data):
        try:
            rows[number] = np.asarray(row)
            dimensions = rows[number].ndim
        except ValueError:
            dimensions = 2
        if dimensions != 1:
            raise UserError(f"row {number} of the data is no row of numbers: {expected}")
    return rows, True


def _whole(sequences: Sequences) -> list[np.ndarray]:
    """The rows as integers."""
    result = []
    for number, row in enumerate(sequences.rows):
        if row.dtype.kind in "iu":
            result.append(row)
            continue
        if row.dtype.kind == "b":
            result.append(row.astype(np.int64))
            continue
        with np.errstate(invalid="ignore"):
            as_integers = row.astype(np.int64) if row.dtype.kind == "f" else None
        if as_integers is None or not np.array_equal(as_integers, row):
            values = [whole_number(value) for value in row.tolist()]
            if None in values:
                position = values.index(None)
                raise UserError(
                    f"{row.tolist()[position]!r} {sequences.place(number, position)} is not a "
                    "whole number: round or bin the values first, or give the converter a transform"
                )
            as_integers = np.array(values, object)  # beyond 64 bits
        result.append(as_integers)
    return result


class NumpyToJsonlConverter:
    """Writes each sequence as a line {"text": "1 2 3 ..."}.

    transform: the text of one value; None = its decimal digits, for whole numbers only.
    """

    def __init__(self, transform: Callable[[Any], str] | None = None) -> None:
        self.transform = transform

    def convert(
        self, data: Any, output_path: str | os.PathLike[str], sequence_length: int | None = None
    ) -> str:
        """Write the lines and return their path. data, sequence_length: as for sequences_of; rows
        stay as they are."""
        sequences = sequences_of(data, sequence_length, whole_numbers=self.transform is None)
        return self._write(sequences, output_path)

    def convert_file(
        self,
        input_path: str | os.PathLike[str],
        output_path: str | os.PathLike[str],
        sequence_length: int | None = 1024,
    ) -> str:
        """The same for the array in a .npy file."""
        return self.convert(load_array(input_path), output_path, sequence_length)

    def _write(self, sequences: Sequences, output_path: str | os.PathLike[str]) -> str:
        rows = sequences.rows
        if sequences.cut_from and len(rows) > 1 and len(rows[-1]) < len(rows[0]):
            print(
                f"1-D data: {len(rows) - 1} sequences of {len(rows[0])} values, and a last one "
                f"with the remaining {len(rows[-1])}"
            )
        text_of = self.transform or str

        def write(file: BinaryIO) -> None:
            for row in rows:
                line = json.dumps({"text": " ".join(map(text_of, row.tolist()))})
                file.write(line.encode() + b"\n")

        atomic_write(output_path, write)
        return os.fspath(output_path)


class JsonlToBinIdxConverter:
    """Writes the token files of lines {"text": ...}: each line a document, ended by id 0.

    tokenizer: None = IntegerTokenizer(359).
    """

    def __init__(self, tokenizer: Tokenizer | str | None = None) -> None:
        self.tokenizer = as_tokenizer(tokenizer)

    def convert(
        self,
        jsonl_path: str | os.PathLike[str],
        output_prefix: str | os.PathLike[str],
        n_epochs: int = 1,
        shuffle: bool = True,
        random_seed: int | None = None,
    ) -> str:
        """Write PREFIX.bin and .idx, with every document n_epochs times, and return the prefix.

        shuffle: another order each time, seeded by random_seed (None = 42); else the lines' own.
        UserError, with the line, for one without `text` or with text that has no ids; nothing is
        written then.
        """
        built = self.build(
            jsonl_path, output_prefix, n_epochs=n_epochs, shuffle=shuffle, random_seed=random_seed
        )
        return built.train.prefix

    def build(
        self,
        jsonl_path: str | os.PathLike[str],
        output_prefix: str | os.PathLike[str],
        *,
        n_epochs: int = 1,
        shuffle: bool = True,
        random_seed: int | None = None,
        val_share: float = 0.0,
    ) -> Built:
        """The same, with a share of the documents in PREFIX_val.bin and .idx instead."""
        if not (whole_number(n_epochs) or 0) >= 1:
            raise UserError(f"n_epochs={n_epochs!r} must be a whole number from 1 up")
        path = Path(jsonl_path)
        if path.is_dir():
            raise UserError(f"{path} is a folder. Give a file of lines {_LINE}")
        if not path.is_file():
            raise MissingFileError(f"no such file: {path}. Give a file of lines {_LINE}")
        if path.suffix != ".jsonl":
            raise UserError(f"{path}: expected a name that ends in .jsonl, with lines {_LINE}")
        seed = (SHUFFLE_SEED if random_seed is None else random_seed) if shuffle else None
        built = build_token_files(
            path,
            output_prefix,
            self.tokenizer,
            val_share=val_share,
            seed=seed,
            n_epoch=int(n_epochs),
            # Further processes would start the user's script again, which may have no main guard.
            workers=1,
        )
        for note in built.notes:
            print(note)
        return built

    def get_data_info(self, prefix: str | os.PathLike[str]) -> dict[str, Any]:
        """num_items, total_tokens and dtype of token files."""
        data = BinIdx(prefix)
        return {
            "num_items": len(data.sizes),
            "total_tokens": len(data),
            "dtype": data.dtype.name,
        }

    def compute_magic_prime(self, data_prefix: str | os.PathLike[str], ctx_len: int) -> int | None:
        """The prime of RWKV-LM's order of windows; None for fewer than 3 * ctx_len tokens."""
        return prime_or_none(len(BinIdx(data_prefix)), ctx_len)


class DataPipeline:
    """Both steps at once, and vocab.txt beside the files.

    tokenizer: None = IntegerTokenizer(359).
    """

    def __init__(self, tokenizer: Tokenizer | str | None = None) -> None:
        self.tokenizer = as_tokenizer(tokenizer)

    def process(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """process_numpy by its older name."""
        return self.process_numpy(*args, **kwargs)

    def process_numpy(
        self,
        data: Any,
        output_dir: str | os.PathLike[str],
        name: str = "data",
        sequence_length: int = 1024,
        n_epochs: int = 1,
        *,
        ctx_len: int | None = None,
        val_share: float = 0.0,
        random_seed: int | None = None,
    ) -> dict[str, Any]:
        """Write all files for an array (see sequences_of) and return what _described says.

        ctx_len: for magic_prime; None = sequence_length.
        """
        _check_file_name(name)
        sequences = sequences_of(data, sequence_length)
        sequences.check_fits(self.tokenizer)
        path = NumpyToJsonlConverter()._write(sequences, Path(output_dir) / f"{name}.jsonl")
        built = JsonlToBinIdxConverter(self.tokenizer).build(
            path,
            Path(output_dir) / name,
            n_epochs=n_epochs,
            val_share=val_share,
            random_seed=random_seed,
        )
        return self._described(built, path, ctx_len or sequence_length)

    def process_jsonl(
        self,
        jsonl_path: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        name: str = "data",
        n_epochs: int = 1,
        sequence_length: int = 1024,
        *,
        val_share: float = 0.0,
        random_seed: int | None = None,
    ) -> dict[str, Any]:
        """Write all files for lines of JSON, of which NAME.jsonl is a copy.

        sequence_length: the ctx_len for magic_prime.
        """
        _check_file_name(name)
        built = JsonlToBinIdxConverter(self.tokenizer).build(
            jsonl_path,
            Path(output_dir) / name,
            n_epochs=n_epochs,
            val_share=val_share,
            random_seed=random_seed,
        )
        copy = Path(output_dir) / f"{name}.jsonl"
        if not (copy.exists() and copy.samefile(jsonl_path)):
            with open(jsonl_path, "rb") as lines:
                atomic_write(copy, lambda file: shutil.copyfileobj(lines, file))
        return self._described(built, os.fspath(copy), sequence_length)

    def _described(self, built: Built, jsonl_path: str, ctx_len: int) -> dict[str, Any]:
        """Paths, and num_sequences and total_tokens for training; val_* is None without a share for
        validation."""
        vocab_path = Path(jsonl_path).with_name("vocab.txt")
        self.tokenizer.save_vocab(vocab_path)
        train, validation = built.train, built.validation
        return {
            "jsonl_path": jsonl_path,
            "binidx_prefix": train.prefix,
            "vocab_path": os.fspath(vocab_path),
            "num_sequences": train.documents,
            "total_tokens": train.tokens,
            "magic_prime": prime_or_none(train.tokens, ctx_len),
            "val_prefix": validation and validation.prefix,
            "val_sequences": validation and validation.documents,
            "val_tokens": validation and validation.tokens,
        }


_LINE = '{"text": "1 2 3 ..."}'


def _check_file_name(name: str) -> None:
    if not isinstance(name, str) or not name or os.path.basename(name) != name or name == "..":
        raise UserError(f"{name!r} is no name for data: give one without folders, such as 'train'")


def as_tokenizer(given: Tokenizer | str | None) -> Tokenizer:
    """The tokenizer itself, the one of a name for load_tokenizer, or IntegerTokenizer(359)."""
    if given is None:
        return IntegerTokenizer()
    if isinstance(given, str | os.PathLike):
        return load_tokenizer(given)
    lacking = [name for name in ("encode", "decode", "vocab_size") if not hasattr(given, name)]
    if isinstance(given, type) or lacking or not hasattr(given, "encode_documents"):
        raise UserError(
            f"tokenizer={given!r} is no tokenizer: expected an object of {BaseTokenizer.__name__} "
            "or a class of yours that derives from it, or a name such as 'world'"
        )
    return given


def load_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in a .npy file, memory-mapped; UserError when it holds something else."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            begin = file.read(6)
        if not begin.startswith((b"\x93NUMPY", b"PK")):
            raise UserError(
                f"{name} is no .npy file (it begins with {begin!r}): give one written by "
                "numpy.save. Text files are read by prepare_data_from_jsonl, or as an array: "
                "numpy.loadtxt"
            )
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MissingFileError(f"no such file: {name}. Give a .npy file.") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder. Give a .npy file.") from None
    except UserError:
        raise
    except (OSError, ValueError, EOFError) as error:
        if "Python objects" in str(error):
            raise UserError(
                f"{name} holds Python objects, which are not read from files: save an array of "
                "whole numbers, or give prepare_data the list of rows"
            ) from None
        raise UserError(f"{name}: cannot be read as a .npy file: {error}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(
            f"{name}: holds several arrays ({', '.join(array.files[:5])}): save the one "
            "to train on with numpy.save"
        )
    return array


def prime_or_none(num_tokens: int, ctx_len: int) -> int | None:
    return magic_prime(num_tokens, ctx_len) if num_tokens // ctx_len >= 3 else None
