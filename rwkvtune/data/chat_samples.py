"""Conversations from JSONL files as tokens, with what is trained of them and what was left out."""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np

from rwkvtune.data.chat import Piece, Template, encoded, messages_of
from rwkvtune.data.sampler import permutation
from rwkvtune.data.text import TextFile, find_files, json_value, numbered_lines
from rwkvtune.data.tokenizers import Tokenizer
from rwkvtune.errors import UserError

OnBadSample = Literal["error", "skip"]
_SHOWN = 3  # places named for each reason
_TOGETHER = 256  # lines whose texts are encoded at once


@dataclass
class Skipped:
    """Lines that were left out, by their reason."""

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, place: str, reason: str) -> None:
        self.places.setdefault(reason, []).append(place)

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def lines(self) -> list[str]:
        """For people: how many of each reason, and where the first ones are."""
        counts = Counter({reason: len(places) for reason, places in self.places.items()})
        lines = []
        for reason, count in counts.most_common(10):
            where = ", ".join(self.places[reason][:_SHOWN]) + (", ..." if count > _SHOWN else "")
            lines.append(f"skipped {count} sample{'s' * (count != 1)}: {reason} ({where})")
        if len(counts) > 10:
            lines.append(f"skipped for {len(counts) - 10} more reasons")
        return lines


class ChatSamples:
    """Samples of different lengths, in the order of their files."""

    def __init__(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        ends: np.ndarray,
        places: Sequence[str],
    ) -> None:
        """ids, trained: of all samples in a row.  ends: [n], where each ends.  places: in files."""
        self.ids, self.trained, self.ends, self.places = ids, trained, ends, places

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and whether each is trained."""
        part = slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))
        return self.ids[part], self.trained[part]

    def shifted(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, whether each target is trained), each one shorter than the sample: the
        only place where labels are moved against inputs."""
        ids, trained = self[number]
        return ids[:-1], ids[1:], trained[1:]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[n]: inputs of each sample."""
        lengths: np.ndarray = np.diff(self.ends, prepend=0) - 1
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """Tells other data under the same name."""
        crc = zlib.crc32(self.trained.tobytes(), zlib.crc32(self.ids.tobytes()))
        return f"{len(self)} samples, {len(self.ids)} tokens, crc32 {crc:08x}"

    def in_words(self) -> str:
        count, share = len(self), self.trained.mean()
        return f"{count:,} samples, {len(self.ids):,} tokens, {share:.0%} of them trained"

    def first_question(self) -> list[int] | None:
        """The ids that stand before the first answer, of the first sample that has some."""
        for n in range(len(self)):
            ids, trained = self[n]
            if (context := int(trained.argmax())) > 1:  # plain text has an END_OF_DOCUMENT alone
                question: list[int] = ids[:context].tolist()
                return question
        return None

    def subset(self, numbers: Iterable[int]) -> ChatSamples:
        chosen = list(numbers)
        parts = [self[n] for n in chosen]
        empty = (self.ids[:0], self.trained[:0])
        return ChatSamples(
            np.concatenate([ids for ids, _ in parts] or [empty[0]]),
            np.concatenate([trained for _, trained in parts] or [empty[1]]),
            np.cumsum([len(ids) for ids, _ in parts], dtype=np.int64),
            [self.places[n] for n in chosen],
        )

    def divided(self, share: float, seed: int) -> tuple[ChatSamples, ChatSamples]:
        """(training, validation): about `share` of the samples, at least one, drawn for validation.

        Samples of equal tokens stay together, so that nothing that is trained is measured.
        UserError when one side would be left empty.
        """
        groups: dict[bytes, list[int]] = {}
        for n in range(len(self)):
            groups.setdefault(hashlib.blake2b(self[n][0].tobytes()).digest(), []).append(n)
        together = list(groups.values())
        wanted = max(1, round(share * len(self)))
        held_out: list[int] = []
        for g in permutation(len(together), f"{seed} held out"):
            if len(held_out) >= wanted:
                break
            held_out += together[g]
        rest = sorted(set(range(len(self))) - set(held_out))
        if not rest:
            raise UserError(
                f"{len(self)} samples ({len(together)} different ones) cannot be divided into "
                f"training and validation: give more, or a val_data_file in place of val_share"
            )
        return self.subset(rest), self.subset(sorted(held_out))


def read_samples(
    name: str,
    tokenizer: Tokenizer,
    template: Template,
    *,
    ctx_len: int,
    on_bad_sample: OnBadSample,
) -> tuple[ChatSamples, Skipped]:
    """All conversations of a JSONL file (also .gz, .zst), of the files of a folder or of a glob.

    ctx_len: the most inputs that a sample may have; a longer one is a bad sample.
    on_bad_sample: "error" raises UserError at the first one, with file and line; "skip" counts.
    UserError also when nothing usable is left.
    """
    ids, trained, ends = array("I"), bytearray(), array("q")
    places: list[str] = []
    skipped = Skipped()
    for batch in _batches(_lines(name)):
        parsed = [_parsed(place, line, template) for place, line in batch]
        encode = _encoder(tokenizer, [p for p in parsed if not isinstance(p, UserError)])
        for (place, _), pieces in zip(batch, parsed, strict=True):
            try:
                if isinstance(pieces, UserError):
                    raise pieces
                more, marks = encoded(pieces, encode)
                if len(more) - 1 > ctx_len:
                    raise _TooLong(len(more) - 1, ctx_len)
                if not any(marks[1:]):
                    raise UserError("nothing in it is trained")
            except UserError as error:
                reason = str(error).removeprefix(f"{place}: ").rstrip(".")
                if on_bad_sample == "error":
                    raise UserError(
                        f"{place}: {reason} (--on_bad_sample skip leaves such samples out)"
                    ) from None
                skipped.add(place, _kind_of(error, reason))
                continue
            ids.extend(more)
            trained.extend(marks)
            ends.append(len(ids))
            places.append(place)
    if not places:
        reasons = "; ".join(skipped.lines()[:3]) or "no line holds anything"
        raise UserError(f"{name}: no usable sample in it: {reasons}")
    samples = ChatSamples(
        np.frombuffer(ids, np.uint32),
        np.frombuffer(trained, np.bool_),
        np.frombuffer(ends, np.int64),
        places,
    )
    return samples, skipped


def _parsed(place: str, line: bytes, template: Template) -> list[Piece] | UserError:
    """The pieces of a sample, or what is wrong with it. Plain text is a document, between two
    END_OF_DOCUMENT, all of it trained."""
    try:
        found = messages_of(json_value(line, place))
        if isinstance(found, str):
            return [Piece(None, False), Piece(found, True), Piece(None, True)]
        return template.pieces(found)
    except UserError as error:
        return error


def _encoder(tokenizer: Tokenizer, samples: Sequence[list[Piece]]) -> Callable[[str], list[int]]:
    """tokenizer.encode for the texts of these samples, done at once, which is faster."""
    texts = list(dict.fromkeys(text for pieces in samples for text, _ in pieces if text))
    try:
        found = tokenizer.encode_documents(texts)
    except UserError:  # so that the sample can be told
        return tokenizer.encode
    ids, table, begin = found.ids.tolist(), {"": list[int]()}, 0
    for text, size in zip(texts, found.sizes.tolist(), strict=True):
        table[text] = ids[begin : begin + size - 1]  # without the END_OF_DOCUMENT behind it
        begin += size
    return table.__getitem__


class _TooLong(UserError):
    def __init__(self, length: int, ctx_len: int) -> None:
        self.kind = f"longer than ctx_len {ctx_len}"
        super().__init__(f"{length} tokens, more than ctx_len {ctx_len}: raise --ctx_len")


def _kind_of(error: UserError, reason: str) -> str:
    """The reason without what differs from line to line."""
    if isinstance(error, _TooLong):
        return error.kind
    return "not JSON" if reason.startswith("not JSON") else reason


def _batches(lines: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    while batch := list(islice(lines, _TOGETHER)):
        yield batch


def _lines(name: str) -> Iterator[tuple[str, bytes]]:
    """Place and content of every line that is not blank."""
    for file in _jsonl_files(name):
        for number, line in numbered_lines(file):
            yield f"{file.path}: line {number}", line


def _jsonl_files(name: str) -> list[TextFile]:
    files, _ = find_files([name])
    wrong = [file for file in files if file.kind != ".jsonl"]
    if wrong:
        raise UserError(
            f"{wrong[0].path}: fine-tuning reads .jsonl files (also .jsonl.gz, .jsonl.zst), one "
            "conversation a line; `rwkvtune train` learns from plain text"
        )
    return files
