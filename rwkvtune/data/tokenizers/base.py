"""What every tokenizer offers, and the parts that all of ours share."""

from __future__ import annotations

import importlib.util
import json
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np

from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write

END_OF_DOCUMENT = 0
"""Id that ends each document in a token file; no tokenizer gives it to text."""

PIECE_BYTES = 1 << 21
"""A longer text is encoded in pieces of about this size, so that memory does not grow with it."""

COMPILE_AFTER = 1 << 23
"""Bytes of text after which a matcher is compiled: what that saves is then more than it takes."""

_CHECKED_TOGETHER = 1 << 14  # ids: what is made for them then stays in the cache
_LOOKED_AT = 1 << 8  # bytes looked at together for a place to cut
_WORD = 8  # bytes compared together
# Row n: n bytes of ones, then zeros.
_MASKS = np.frombuffer(
    b"".join(b"\xff" * n + bytes(_WORD - n) for n in range(_WORD + 1)), dtype=np.uint64
)


class EncodedTexts(NamedTuple):
    """Several texts as ids."""

    ids: np.ndarray
    """[n] of an integer type: of all texts, one after the other, END_OF_DOCUMENT after each."""

    sizes: np.ndarray
    """[texts] int64: how many of the ids belong to each."""

    text_bytes: np.ndarray
    """[texts] int64: how long each is in UTF-8."""


class Tokenizer(Protocol):
    """Text to ids and back. No text gives id 0 (END_OF_DOCUMENT), and it decodes to nothing."""

    name: str
    """`bytes`, `chars`, `vocab` or `world`."""

    vocab_size: int
    """Rows that a model for it needs; every id is below."""

    unused_ids: Collection[int]
    """Ids that stand for no text and that no text gives, END_OF_DOCUMENT apart."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, which decode back to exactly it; UserError when that is not possible."""

    def encode_documents(self, texts: Sequence[str], *, unfinished: bool = False) -> EncodedTexts:
        """Many texts at once, much faster. Each is checked to come back exactly; UserError when one
        does not.

        unfinished: no END_OF_DOCUMENT after the last text, which goes on elsewhere.
        """

    def last_cut(self, encoded: bytes) -> int:
        """A place, as late as can be found, where a text that begins with these UTF-8 bytes may be
        cut so that the ids of both parts are those of the whole. 0: there is none.
        """

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of the ids. A token may end inside a character: join bytes first when
        streaming.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""

    def token_byte_lengths(self) -> np.ndarray:
        """[vocab_size] int64: number of bytes that each id stands for."""

    def save_vocab(self, path: str | os.PathLike[str]) -> None:
        """Write the ids that stand for text as a vocabulary file in RWKV's format."""

    def to_json(self) -> dict[str, Any]:
        """All that load_tokenizer needs to make the same one again."""


class TableTokenizer:
    """What follows from a table alone, for tokenizers in which each id stands for a fixed string of
    bytes and a text is cut from its start, always taking the longest string that fits.

    table: the bytes of ids 0, 1, 2, ...; empty for END_OF_DOCUMENT.
    """

    name: str
    unused_ids: Collection[int] = ()

    def __init__(self, table: Sequence[bytes]) -> None:
        self.vocab_size = len(table)
        self._table = table

    def _append_ids(self, ids: array[int], text: str, encoded: bytes) -> None:
        """Append the ids of the text, which is `encoded` in UTF-8, to an array of type "I"."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encode_documents([text], unfinished=True).ids.tolist()
        return ids

    def encode_documents(self, texts: Sequence[str], *, unfinished: bool = False) -> EncodedTexts:
        all_encoded = [utf8(text) for text in texts]
        text_bytes = np.fromiter(map(len, all_encoded), np.int64, len(all_encoded))
        ids = self._matched(all_encoded)
        if ids is None:
            collected = array("I")
            self._append_documents(collected, texts, all_encoded)
            ids = np.frombuffer(collected, np.uint32)
        if unfinished:
            ids = ids[:-1]
        ends = np.flatnonzero(ids == END_OF_DOCUMENT) + 1
        if unfinished:
            ends = np.append(ends, len(ids))
        if not self._gives_back(ids, ends, text_bytes, b"".join(all_encoded)):
            raise self._does_not_come_back(texts)
        return EncodedTexts(ids, np.diff(ends, prepend=0), text_bytes)

    def _matched(self, all_encoded: Sequence[bytes]) -> np.ndarray | None:
        """What _append_documents appends, from a faster matcher; None where there is none."""
        return None

    def _append_documents(
        self, ids: array[int], texts: Sequence[str], all_encoded: Sequence[bytes]
    ) -> None:
        """Append the ids of all texts, END_OF_DOCUMENT after each."""
        for text, encoded in zip(texts, all_encoded, strict=True):
            try:
                for piece, encoded_piece in self._pieces(text, encoded):
                    self._append_ids(ids, piece, encoded_piece)
            except UserError:
                self._append_ids(ids, text, encoded)  # for the position in the whole text
                raise
            ids.append(END_OF_DOCUMENT)

    def _pieces(self, text: str, encoded: bytes) -> Iterator[tuple[str, bytes]]:
        """The text, and in UTF-8, in pieces whose ids can be made one by one."""
        begin = 0
        while len(encoded) - begin > PIECE_BYTES:
            cut = self.last_cut(encoded[begin : begin + PIECE_BYTES])
            if not cut:
                break
            piece = encoded[begin : begin + cut]
            yield piece.decode(), piece
            begin += cut
        if begin:
            encoded = encoded[begin:]
            text = encoded.decode()
        yield text, encoded

    def _gives_back(
        self, ids: np.ndarray, ends: np.ndarray, text_bytes: np.ndarray, expected: bytes
    ) -> bool:
        """Whether the ids stand for exactly these texts, those of each text up to its end.

        Several times faster than joining the strings of the ids: 8 bytes at a time, the words that
        begin at each byte of the texts against the words of the ids.
        """
        offsets = np.zeros(len(ends) + 1, np.int64)  # bytes before the end of each text
        begin = 0
        for i in range(0, len(ids), _CHECKED_TOGETHER):
            part = ids[i : i + _CHECKED_TOGETHER].astype(np.int64)
            lengths = self._lengths.take(part)
            stops = np.cumsum(lengths)
            first, last = np.searchsorted(ends, (i, i + len(part)), side="right")
            offsets[first:last] = begin + stops.take(ends[first:last] - i - 1)
            content = expected[begin : begin + int(stops[-1])]
            if len(content) < stops[-1]:
                return False
            padded = np.frombuffer(content + bytes(_WORD), np.uint8)
            words = np.ndarray((len(content) + 1,), np.uint64, padded, strides=(1,))
            if not self._are_words(part, lengths, words, stops - lengths):
                return False
            begin += len(content)
        return begin == len(expected) and np.array_equal(offsets[:-1], np.cumsum(text_bytes))

    def _are_words(
        self, ids: np.ndarray, lengths: np.ndarray, words: np.ndarray, starts: np.ndarray
    ) -> bool:
        """Whether the ids, which have these lengths, are what begins at these bytes."""
        found = self._heads.take(ids)
        for word in count(1):
            found ^= words.take(starts)
            found &= _MASKS.take(lengths, mode="clip")
            if found.any():
                return False
            longer = np.flatnonzero(lengths > _WORD)
            if not len(longer):
                break
            ids, starts, lengths = ids[longer], starts[longer] + _WORD, lengths[longer] - _WORD
            found = self._words.take(self._first_words.take(ids) + word)
        return True

    def _does_not_come_back(self, texts: Sequence[str]) -> UserError:
        """The error for the first text whose ids stand for something else."""
        for text in texts:
            ids, encoded = array("I"), utf8(text)
            self._append_ids(ids, text, encoded)
            decoded = b"".join(map(self._table.__getitem__, ids))
            if decoded != encoded:
                return self._lossy(encoded, decoded)
        raise AssertionError("the texts come back one by one, but not together")

    def _lossy(self, encoded: bytes, decoded: bytes) -> UserError:
        return UserError(
            f"the {self.name} tokenizer does not give this text back ({len(encoded)} bytes, "
            f"beginning {encoded[:40].decode(errors='replace')!r}). Use the bytes tokenizer for it."
        )

    def last_cut(self, encoded: bytes) -> int:
        end = len(encoded)
        while end > 1:  # looked at from behind: the first few bytes nearly always do
            begin = max(end - _LOOKED_AT, 0)
            content = np.frombuffer(encoded[begin:end], np.uint8)
            # Where no token holds these two neighbours, no token lies across them.
            is_cut = ~self._neighbours[content[:-1], content[1:]] & _begins_character(content[1:])
            if is_cut.any():
                return begin + 1 + int(np.flatnonzero(is_cut)[-1])
            end = begin + 1 if begin else 0
        # Letters of DNA, digits, one letter repeated: cut where the tokens themselves end, but not
        # so near to the end that a longer one might have fitted.
        ids, text = array("I"), encoded.decode(errors="ignore")
        self._append_ids(ids, text, text.encode())
        ends = np.cumsum(self._lengths.take(np.frombuffer(ids, np.uint32)))
        ends = ends[ends <= len(encoded) - self._lengths.max()]
        ends = ends[_begins_character(np.frombuffer(encoded, np.uint8)[ends])]
        return int(ends[-1]) if len(ends) else 0

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self._table), dtype=np.int64, count=self.vocab_size)

    @cached_property
    def _first_words(self) -> np.ndarray:
        """[vocab_size] int64: where the words of each id begin in _words."""
        counts = -(-self._lengths // _WORD)
        first: np.ndarray = np.cumsum(counts) - counts
        return first

    @cached_property
    def _words(self) -> np.ndarray:
        """Bytes of all ids, each filled with zeros to whole words, as uint64."""
        filled = b"".join(token + bytes(-len(token) % _WORD) for token in self._table)
        return np.frombuffer(filled + bytes(_WORD), np.uint64)

    @cached_property
    def _heads(self) -> np.ndarray:
        """[vocab_size] uint64: the first word of each id, zeros for none."""
        heads: np.ndarray = np.where(self._lengths > 0, self._words[self._first_words], 0)
        return heads.astype(np.uint64)

    @cached_property
    def _neighbours(self) -> np.ndarray:
        """[256, 256] bool: whether a token holds the one byte followed by the other."""
        content = np.frombuffer(b"".join(self._table), np.uint8)
        is_first = np.zeros(len(content) + 1, bool)
        is_first[np.cumsum(self._lengths)] = True
        seconds = np.flatnonzero(~is_first[1:-1]) + 1
        neighbours = np.zeros((256, 256), bool)
        neighbours[content[seconds - 1], content[seconds]] = True
        return neighbours

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            position = next(i for i, id in enumerate(ids) if not 0 <= id < self.vocab_size)
            raise UserError(
                f"cannot decode id {ids[position]} at position {position}: the {self.name} "
                f"tokenizer has ids 0 to {self.vocab_size - 1}. Were these ids made with another "
                "tokenizer?"
            )
        return b"".join(map(self._table.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_byte_lengths(self) -> np.ndarray:
        lengths: np.ndarray = self._lengths.copy()
        return lengths

    def save_vocab(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary file; GenericTokenizer(path) reads it."""
        from rwkvtune.data.tokenizers.vocabulary import save_vocabulary

        no_text = {END_OF_DOCUMENT, *self.unused_ids}
        save_vocabulary(
            {id: token for id, token in enumerate(self._table) if id not in no_text}, path
        )


class MatchedTokenizer(TableTokenizer):
    """A table of any strings, which takes a matcher. After COMPILE_AFTER bytes it is our own,
    compiled by numba where that is installed."""

    def __init__(self, table: Sequence[bytes]) -> None:
        super().__init__(table)
        self._bytes_seen = 0

    def _matched(self, all_encoded: Sequence[bytes]) -> np.ndarray | None:
        self._bytes_seen += sum(map(len, all_encoded))
        if self._bytes_seen < COMPILE_AFTER or self._compiled is None:
            return None
        ids: np.ndarray | None = self._compiled.encode(all_encoded)
        return ids

    @cached_property
    def _compiled(self) -> Any:
        if importlib.util.find_spec("numba") is None:
            return None
        from rwkvtune.data.tokenizers.compiled import CompiledMatcher

        no_text = {END_OF_DOCUMENT, *self.unused_ids}
        return CompiledMatcher(pair for pair in enumerate(self._table) if pair[0] not in no_text)


def _begins_character(content: np.ndarray) -> np.ndarray:
    """Whether each byte of UTF-8 is the first of a character."""
    begins: np.ndarray = (content & 0xC0) != 0x80
    return begins


def utf8(text: str) -> bytes:
    """The text as UTF-8; UserError for half of a surrogate pair, which JSON can hold but UTF-8
    cannot.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate "
            "pair, which is not valid Unicode text. Repair or remove it in the input."
        ) from None


def as_json(tokenizer: Tokenizer) -> bytes:
    """Content of the file that load_tokenizer(path) reads."""
    return (json.dumps(tokenizer.to_json(), ensure_ascii=False, indent=1) + "\n").encode()


def save_json(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write that file, whole or not at all."""
    atomic_write(path, lambda file: file.write(as_json(tokenizer)))
