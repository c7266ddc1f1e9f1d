"""Text files to token files: tokenize in one or several processes, order the documents, write.

The text is read once and its tokens are kept in a file without a name until everything is done, so
that memory stays the same whatever the size of the text; only numbers about each document (some 60
bytes) and a few megabytes of text for each process are held.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkvtune.data.binidx import TokenSpool, binidx_prefix, token_dtype
from rwkvtune.data.text import (
    Batch,
    TextFile,
    byte_of_character,
    find_files,
    in_two,
    named,
    read_batches,
    survey,
)
from rwkvtune.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    as_json,
    data_tokenizer_path,
    load_tokenizer,
    tokenizer_from_json,
)
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write_together, remove_leftovers

WORTH_PROCESSES = 64 << 20
"""Bytes of input from which on several processes are faster: each takes a second to start."""

MOST_PROCESSES = 16
"""Where nobody says how many: one process reads for all, and more would wait for it."""


@dataclass(frozen=True)
class TokenFiles:
    """What one pair of token files holds."""

    prefix: str

    documents: int

    tokens: int
    """End-of-document tokens, one for each document, included."""

    text_bytes: int
    """UTF-8 bytes of the text."""

    longest: int
    """Tokens of the longest document, its end included."""

    @property
    def bytes_per_token(self) -> float:
        """Of the text; the ends of documents are not counted."""
        return self.text_bytes / max(self.tokens - self.documents, 1)


@dataclass(frozen=True)
class Built:
    """What build_token_files wrote."""

    train: TokenFiles

    validation: TokenFiles | None
    """None when no share was asked for."""

    tokenizer: Tokenizer

    notes: list[str]
    """Lines for the user: what was passed over, kept, chosen or replaced, and why."""


@dataclass(frozen=True)
class Progress:
    """How far a step of the work has come."""

    step: str

    done_bytes: int
    """Of the inputs, as they lie on the disk."""

    total_bytes: int


def build_token_files(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    prefix: str | os.PathLike[str],
    tokenizer: Tokenizer | str,
    *,
    val_share: float = 0.0,
    seed: int | None = None,
    n_epoch: int = 1,
    workers: int | None = 1,
    text_key: str = "text",
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> Built:
    """Write PREFIX.bin, .idx and .tokenizer.json, and PREFIX_val.* when val_share > 0: all of them
    or, when anything fails, none. Older files of these names are replaced at the very end.

    inputs: files, folders or globs of .txt, .jsonl and .parquet (find_files). A document is a .txt
    file, a line of .jsonl or a row of Parquet. Each is followed by END_OF_DOCUMENT.
    tokenizer: one of ours, `chars` for the characters of this text, or a name for load_tokenizer.
    val_share: 0 to below 1, of the tokens, in whole documents; of a single document the characters
    from int(length * (1 - val_share)) on. Training never contains them.
    seed: None keeps the order of the inputs and takes validation from their end. With a number,
    validation documents are drawn (and keep their order), and those for training are shuffled, once
    more for each epoch, as RWKV-LM's make_data does after random.seed(seed).
    n_epoch: how often each training document is written, one epoch after the other.
    workers: processes that tokenize; 0 or 1: this one does; None: one for each core where the input
    is large enough. They import the calling script: its work belongs under `if __name__ ==
    "__main__"`.
    text_key: field of JSON and column of Parquet with the text.
    """
    _check(val_share, seed, n_epoch, workers)
    prefix = _checked_prefix(prefix)
    source = _Source.find(inputs, text_key, on_progress)
    _refuse_own_output(source.files, prefix)
    with TokenSpool(prefix, vocab_size=1):
        pass  # a folder that cannot be written is refused before any work
    notes = [*source.notes, *_about_older_files(prefix, val_share)]
    tokenizer, cut_at = _look_first(source, tokenizer, val_share)
    with TokenSpool(prefix, tokenizer.vocab_size) as spool:
        batches = source.batches("tokenizing", tokenizer.last_cut, cut_at)
        encoded = _encode_all(batches, tokenizer, _num_processes(workers, source.num_bytes))
        text_bytes = _fill(spool, encoded, notes)
        if not text_bytes.any():
            raise source.no_text()
        sizes = np.frombuffer(spool.sizes, "i")
        train, validation = _divide(sizes, text_bytes, val_share, seed, is_cut=cut_at is not None)
        on_progress(Progress("writing", 0, 0))
        writes = _pair_with_tokenizer(spool, prefix, tokenizer, _epochs(train, n_epoch, seed))
        if val_share:
            writes |= _pair_with_tokenizer(spool, f"{prefix}_val", tokenizer, [validation])
        with suppress(OSError):
            remove_leftovers(Path(prefix).parent)  # of builds that were killed
        atomic_write_together(writes)

        def described(prefix: str, documents: np.ndarray, times: int) -> TokenFiles:
            tokens = times * int(sizes[documents].sum(dtype=np.int64))
            num_bytes = times * int(text_bytes[documents].sum())
            longest = int(sizes[documents].max())
            return TokenFiles(prefix, times * len(documents), tokens, num_bytes, longest)

        return Built(
            described(prefix, train, n_epoch),
            described(f"{prefix}_val", validation, 1) if val_share else None,
            tokenizer,
            notes,
        )


def _look_first(
    source: _Source, tokenizer: Tokenizer | str, val_share: float
) -> tuple[Tokenizer, int | None]:
    """The tokenizer; and the character at which the only document is to be cut, None for several or
    for none to be cut. Reads the text where that is not known without."""
    wants_characters = tokenizer == "chars"
    if isinstance(tokenizer, str) and not wants_characters:
        try:
            tokenizer = load_tokenizer(tokenizer)
        except MissingFileError as error:
            raise MissingFileError(f"{error} Or chars, for the characters of this text.") from None
    cut_at = None
    if wants_characters or val_share:
        for file in source.files:
            if not file.path.is_file():
                raise UserError(
                    f"{file.path} is no plain file: it can be read only once, but chars and "
                    "val_share need to look at the text before. Save it in a file."
                )
        seen = survey(
            source.batches("looking at the characters", ByteTokenizer().last_cut),
            until_second=not wants_characters,
        )
        if wants_characters:
            if not seen.characters:
                raise source.no_text()
            tokenizer = CharTokenizer(seen.characters)
        if val_share and seen.documents == 1:
            # int(0.9 * length) for a tenth is nanoGPT's split of its Shakespeare file.
            cut_at = int(seen.num_characters * (1 - val_share))
    assert not isinstance(tokenizer, str)
    return tokenizer, cut_at


def _pair_with_tokenizer(
    spool: TokenSpool, prefix: str, tokenizer: Tokenizer, order: Iterable[np.ndarray]
) -> dict[Path, Callable[[BinaryIO], object]]:
    """What atomic_write_together needs for PREFIX.tokenizer.json, .bin and .idx."""
    content = as_json(tokenizer)
    return {
        data_tokenizer_path(prefix): lambda file: file.write(content),
        **spool.pair(prefix, order),
    }


@dataclass(frozen=True)
class _Source:
    """The files to be read."""

    files: list[TextFile]
    notes: list[str]
    text_key: str
    on_progress: Callable[[Progress], object]
    num_bytes: int

    @staticmethod
    def find(
        inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        text_key: str,
        on_progress: Callable[[Progress], object],
    ) -> _Source:
        names = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
        files, notes = find_files(names)
        num_bytes = sum(file.path.stat().st_size for file in files)
        return _Source(files, notes, text_key, on_progress, num_bytes)

    def batches(
        self, step: str, last_cut: Callable[[bytes], int], cut_at: int | None = None
    ) -> Iterator[Batch]:
        """All documents. cut_at: character at which the only one is cut in two."""
        cut_byte = 0
        if cut_at is not None:
            for file in self.files:
                if file.kind == ".txt":
                    cut_byte = byte_of_character(file, cut_at)
        batches = read_batches(self.files, key=self.text_key, last_cut=last_cut, cut_at=cut_byte)
        if cut_at is not None and not cut_byte:
            batches = in_two(batches, cut_at)
        done = 0
        for batch in batches:
            yield batch
            done += batch.read_bytes
            self.on_progress(Progress(step, done, self.num_bytes))

    def no_text(self) -> UserError:
        shown = ", ".join(str(file.path) for file in self.files[:3])
        more = ", ..." if self.files[3:] else ""
        return UserError(f"{shown}{more}: holds no text. Give at least one character.")


@dataclass(frozen=True)
class _Encoded:
    """What becomes of one batch."""

    ids: np.ndarray
    """[n] in the dtype of the token file, END_OF_DOCUMENT after each document."""

    sizes: np.ndarray
    """Tokens of each document, int64."""

    text_bytes: np.ndarray
    """UTF-8 bytes of each document, int64."""

    unfinished: bool
    blank_lines: int
    byte_order_marks: int


def _encode(batch: Batch, tokenizer: Tokenizer) -> _Encoded:
    texts, places, blank_lines = batch.documents()
    try:
        encoded = tokenizer.encode_documents(texts, unfinished=batch.unfinished)
    except UserError:
        for text, place in zip(texts, places, strict=True):
            with named(place):
                tokenizer.encode(text)
        raise
    return _Encoded(
        encoded.ids.astype(token_dtype(tokenizer.vocab_size)),
        encoded.sizes,
        encoded.text_bytes,
        batch.unfinished,
        blank_lines,
        batch.byte_order_marks,
    )


def _fill(
    spool: TokenSpool, encoded: Generator[_Encoded, None, None], notes: list[str]
) -> np.ndarray:
    """Collect all documents; returns the UTF-8 bytes of each, int64, and adds to the notes."""
    text_bytes = array("q")
    blank_lines = byte_order_marks = 0
    unfinished = False
    with closing(encoded):
        for part in encoded:
            spool.add_documents(part.ids, part.sizes, unfinished=part.unfinished)
            if unfinished:
                text_bytes[-1] += part.text_bytes[0]
            text_bytes.frombytes(part.text_bytes[int(unfinished) :].tobytes())
            unfinished = part.unfinished
            blank_lines += part.blank_lines
            byte_order_marks += part.byte_order_marks
    for count, what in (
        (blank_lines, "blank lines, passed over"),
        (byte_order_marks, "files that begin with a byte order mark, kept as text (U+FEFF)"),
        (text_bytes.count(0), "documents without text, each kept as its end-of-document token"),
    ):
        if count:
            notes.append(f"{what}: {count}")
    return np.frombuffer(text_bytes, np.int64)


def _divide(
    sizes: np.ndarray,
    text_bytes: np.ndarray,
    val_share: float,
    seed: int | None,
    *,
    is_cut: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents for training and for validation, int64."""
    if not val_share:
        return np.arange(len(sizes)), np.arange(0)
    order = array("q", range(len(sizes)))
    if seed is not None and not is_cut:
        random.Random(f"validation {seed}").shuffle(order)
    shuffled = np.array(order)
    ends = np.cumsum(sizes[shuffled], dtype=np.int64)
    kept = math.floor(int(ends[-1]) * (1 - Fraction(str(val_share))))  # 0.1 is meant as a tenth
    first = 1 if is_cut else int(np.searchsorted(ends, kept, side="right"))
    train, validation = np.sort(shuffled[:first]), np.sort(shuffled[first:])
    if not (text_bytes[train].any() and text_bytes[validation].any()):
        raise UserError(
            f"val_share={val_share} leaves nothing for training or for validation of "
            f"{1 if is_cut else len(sizes)} documents with {ends[-1]} tokens. Give more text or "
            "another share."
        )
    return train, validation


def _epochs(documents: np.ndarray, n_epoch: int, seed: int | None) -> Iterator[np.ndarray]:
    """The order of each epoch."""
    order = array("q", documents.tobytes())
    generator = random.Random(seed)
    for _ in range(n_epoch):
        if seed is not None:
            generator.shuffle(order)  # the same list again and again, like make_data
        yield np.array(order)


def _encode_all(
    batches: Iterator[Batch], tokenizer: Tokenizer, num_processes: int
) -> Generator[_Encoded, None, None]:
    """All batches in their order, tokenized here or in processes of their own."""
    if num_processes < 2:
        _keep_freed_memory()
        yield from (_encode(batch, tokenizer) for batch in batches)
        return
    pool = ProcessPoolExecutor(
        num_processes,
        # Started afresh: a fork of a process with threads (a progress line) may hang.
        mp_context=get_context("spawn"),
        initializer=_begin_process,
        initargs=(json.dumps(tokenizer.to_json()),),
    )
    waiting: deque[Future[_Encoded]] = deque()
    try:
        while True:
            try:
                batch = next(batches, None)
            except UserError:  # what was read before it comes first, and so do its errors
                for future in waiting:
                    future.result()
                raise
            if batch is None:
                break
            with _interrupts_held():
                waiting.append(pool.submit(_encode_in_process, batch))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizing process ended before its work was done; the system may have stopped it "
            f"for want of memory. Nothing was written: use fewer than {num_processes} workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_tokenizer_of_process: Tokenizer


def _begin_process(tokenizer: str) -> None:
    global _tokenizer_of_process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep_freed_memory()
    _tokenizer_of_process = tokenizer_from_json(json.loads(tokenizer), "the tokenizer")


def _encode_in_process(batch: Batch) -> _Encoded:
    return _encode(batch, _tokenizer_of_process)


def _keep_freed_memory() -> None:
    """A quarter of the time would go into getting memory from the system, batch after batch.

    glibc gives freed memory back at once, but not pieces smaller than the largest that it has seen
    freed, up to 32 MB.
    """
    np.empty(31 << 20, np.uint8)


def _end_with_parent() -> None:
    """Even when kill -9 ends the parent, which then tells nobody."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started in this block never see Ctrl-C, which reaches all in the terminal's
    group: it is for us to stop them. We see it after the block.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _num_processes(workers: int | None, num_bytes: int) -> int:
    if workers is not None:
        return workers
    if num_bytes < WORTH_PROCESSES:
        return 1
    is_known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_known else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


def _check(val_share: float, seed: int | None, n_epoch: int, workers: int | None) -> None:
    if not 0 <= val_share < 1:
        raise UserError(f"val_share={val_share}: expected a share from 0 to below 1, such as 0.1.")
    if n_epoch < 1:
        raise UserError(f"n_epoch={n_epoch}: expected 1 or more.")
    if seed is not None and seed < 0:
        raise UserError(f"seed={seed}: expected 0 or more.")
    if workers is not None and workers < 0:
        raise UserError(f"workers={workers}: expected 0 or more.")


def _checked_prefix(prefix: str | os.PathLike[str]) -> str:
    text = os.fspath(prefix)
    if os.path.basename(text) in ("", ".", ".."):
        raise UserError(
            f"output {text!r} names no files: expected a prefix such as data/my, for data/my.bin "
            "and data/my.idx."
        )
    return binidx_prefix(text)


def _outputs(prefix: str) -> list[str]:
    return [
        name + suffix
        for name in (prefix, f"{prefix}_val")
        for suffix in (".bin", ".idx", str(data_tokenizer_path("")))
    ]


def _refuse_own_output(files: Sequence[TextFile], prefix: str) -> None:
    outputs = {os.path.realpath(path) for path in _outputs(prefix)}
    for file in files:
        if os.path.realpath(file.path) in outputs:
            raise UserError(
                f"{file.path} is an input and would be replaced by the output: choose another."
            )


def _about_older_files(prefix: str, val_share: float) -> list[str]:
    notes = []
    if os.path.exists(f"{prefix}.idx"):
        notes.append(f"replaced the token files of {prefix} that were there")
    if os.path.exists(f"{prefix}_val.idx"):
        notes.append(
            f"replaced the token files of {prefix}_val that were there"
            if val_share
            else f"{prefix}_val.bin is from an earlier build, and left alone: its text may now be "
            "among that for training"
        )
    return notes
