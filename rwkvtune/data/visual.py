"""Pictures and conversations as batches for a language model that sees.

    record -> one sequence of ids and labels per record -> length buckets -> padded batches

Source of the two forms and of the padding: WorldRWKV and its fork (`visual`), its later versions
(placeholders).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rwkvtune.data.batch import IGNORED_TARGET
from rwkvtune.data.images import PictureError, PictureStore, Preprocessing
from rwkvtune.data.llava import picture_names
from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer
from rwkvtune.errors import UserError

IMAGE_TAG = "<image>"
TURN_BEGIN, TURN_END = "\x16", "\x17"
SPEAKERS = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"}
VISION_START, VISION_END, IMAGE_PAD = 65530, 65531, 65532
"""Ids of the later versions' vocabulary, behind those of the World tokenizer."""
LENGTH_MULTIPLE = 16
"""Batches are padded to a multiple of this, as upstream's kernel needs it."""

Form = Literal["prefix", "placeholder"]
"""prefix: all pictures, then the dialogue, with a space behind "User:" and "Assistant:".
placeholder: each picture where its tag stands, between two marks; no space."""


@dataclass(frozen=True)
class Sample:
    """One record as tokens, before padding; all arrays are [T]."""

    ids: np.ndarray
    labels: np.ndarray
    """The token itself where it is to be learned, else IGNORED_TARGET."""
    is_image: np.ndarray
    """True where a picture's token stands."""
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class VisualBatch:
    """Padded samples with their pictures; see VisionLanguageModel for the shapes."""

    input_ids: Tensor
    targets: Tensor
    image_positions: Tensor
    image_rows: Tensor | None
    pixels: Tensor | None
    features: Tensor | None = None
    num_tokens: int = 0
    """Without padding."""

    def to(self, device: torch.device | str) -> VisualBatch:
        """The same batch on another device."""

        def moved(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return VisualBatch(
            moved(self.input_ids),
            moved(self.targets),
            moved(self.image_positions),
            moved(self.image_rows),
            moved(self.pixels),
            moved(self.features),
            self.num_tokens,
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """(rows, tokens without padding, those of them that stand for pictures)."""
        return len(self.input_ids), self.num_tokens, int(self.image_positions.sum())

    @property
    def target_tokens(self) -> int:
        """Number of targets that count."""
        return int((self.targets != IGNORED_TARGET).sum())


class Records(Protocol):
    """What a data set's records are read from, such as llava.RecordFile."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Assembly:
    """How a record becomes a sequence."""

    tokenizer: Tokenizer
    image_tokens: int
    """Per picture, as the language model sees it."""
    form: Form = "prefix"
    keep_image_tag: bool = False
    """prefix: leave the word <image> in the text, as upstream does."""

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """UserError says what is wrong with a record: roles, turns or pictures."""
        pictures = tuple(picture_names(dict(record)))
        turns = dialogue(record)
        if self.form == "placeholder":
            turns = _with_all_tags(turns, len(pictures))
        elif pictures and not self.keep_image_tag:
            turns = [(who, without_image_tags(text)) for who, text in turns]
        pieces = [self._turn(who, text) for who, text in turns]
        if self.form == "prefix":
            pieces.insert(0, self._pictures(len(pictures)))
        ids, labels, is_image = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        if not (labels != IGNORED_TARGET).any():
            raise UserError("no turn of the assistant: nothing to learn from")
        return Sample(ids, labels, is_image, pictures)

    def question(self, text: str, *, pictures: int = 0) -> Sample:
        """What stands before an answer: pictures, the user's turn and the assistant's name."""
        conversation = [{"from": "human", "value": text}, {"from": "gpt", "value": ""}]
        whole = self.sample({"image": ["picture"] * pictures, "conversations": conversation})
        last = self._turn("Assistant", "")[0]
        name = self.tokenizer.encode(f"{TURN_BEGIN}Assistant:")
        before = len(whole.ids) - len(last)
        ids = np.concatenate([whole.ids[:before], np.array(name, dtype=np.int64)])
        is_image = np.zeros(len(ids), dtype=bool)
        is_image[:before] = whole.is_image[:before]
        return Sample(ids, np.full_like(ids, IGNORED_TARGET), is_image, whole.pictures)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as they follow `question`, with the mark that ends it."""
        space = " " if self.form == "prefix" else ""
        return self.tokenizer.encode(f"{space}{text}{TURN_END}")

    def _turn(self, who: str, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        space = " " if self.form == "prefix" else ""
        whole = f"{TURN_BEGIN}{who}:{space}{text}{TURN_END}"
        parts = [whole]
        if self.form == "placeholder" and who == "User":
            parts = whole.split(IMAGE_TAG)
        pieces = []
        for number, part in enumerate(parts):
            if number:
                pieces += [_ids([VISION_START]), self._pictures(1), _ids([VISION_END])]
            pieces.append(_ids(self._encode(part)))
        ids, labels, is_image = (np.concatenate(p) for p in zip(*pieces, strict=True))
        if who == "Assistant":
            labels = ids.copy()
        return ids, labels, is_image

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        """Remembers: the same few instructions stand before hundreds of thousands of captions."""
        return lru_cache(maxsize=1024)(self.tokenizer.encode)

    def _pictures(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = count * self.image_tokens
        pad = IMAGE_PAD if self.form == "placeholder" else END_OF_DOCUMENT
        ids, labels, _ = _ids([pad] * tokens)
        return ids, labels, np.ones(tokens, dtype=bool)


def _ids(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of text from which nothing is learned."""
    array = np.array(ids, dtype=np.int64)
    return array, np.full_like(array, IGNORED_TARGET), np.zeros(len(array), dtype=bool)


def dialogue(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """[(User or Assistant, what is said)] of a record; UserError for what is no conversation."""
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise UserError("no conversation: expected a list of turns under conversations")
    turns = []
    for turn in conversation:
        who, text = (
            (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        )
        speaker = SPEAKERS.get(who.lower()) if isinstance(who, str) else None
        if speaker is None:
            raise UserError(f"unknown role {who!r}: expected {', '.join(SPEAKERS)}")
        if not isinstance(text, str):
            raise UserError(f"a turn of {who} has no text: expected a string under value")
        turns.append((speaker, text))
    return turns


def without_image_tags(text: str) -> str:
    """Text without <image> and the one newline that sets it apart from the words."""
    for tag in (f"{IMAGE_TAG}\n", f"\n{IMAGE_TAG}", IMAGE_TAG):
        text = text.replace(tag, "")
    return text


def _with_all_tags(turns: list[tuple[str, str]], pictures: int) -> list[tuple[str, str]]:
    """One tag per picture: those that the text lacks come before the first user turn's words."""
    tags = sum(text.count(IMAGE_TAG) for who, text in turns if who == "User")
    if tags > pictures:
        raise UserError(f"{tags} tags {IMAGE_TAG} for {pictures} pictures: give one for each")
    lacking = pictures - tags
    if lacking:
        first = next((i for i, (who, _) in enumerate(turns) if who == "User"), None)
        if first is None:
            raise UserError("a picture needs a turn of the user to stand in")
        who, text = turns[first]
        turns = [*turns[:first], (who, IMAGE_TAG * lacking + text), *turns[first + 1 :]]
    return turns


def collate(
    samples: Sequence[Sample],
    ctx_len: int,
    *,
    pixels: np.ndarray | None = None,
    features: np.ndarray | Tensor | None = None,
) -> VisualBatch:
    """Samples side by side, T = min(ctx_len, the longest rounded up to a multiple of 16).

    Inputs are padded with END_OF_DOCUMENT and targets shifted by one, so that position t predicts
    token t + 1. What is too long loses its right end.
    """
    longest = max(len(sample.ids) for sample in samples)
    T = min(ctx_len, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    ids = np.full((len(samples), T), END_OF_DOCUMENT, dtype=np.int64)
    targets = np.full((len(samples), T), IGNORED_TARGET, dtype=np.int64)
    is_image = np.zeros((len(samples), T), dtype=bool)
    rows, first_row = [], 0
    for i, sample in enumerate(samples):
        length = min(len(sample.ids), T)
        ids[i, :length] = sample.ids[:length]
        is_image[i, :length] = sample.is_image[:length]
        shifted = sample.labels[1 : T + 1]
        targets[i, : len(shifted)] = shifted
        rows.append(first_row + np.arange(int(is_image[i].sum())))
        first_row += int(sample.is_image.sum())
    used = np.concatenate(rows)
    return VisualBatch(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(is_image),
        None if len(used) == first_row else torch.from_numpy(used),
        None if pixels is None else torch.from_numpy(pixels),
        None if features is None else torch.as_tensor(features),
        num_tokens=sum(min(len(sample.ids), T) for sample in samples),
    )


@dataclass
class Problems:
    """Records and pictures that could not be used: how many of each kind, and the first names."""

    counts: dict[str, int] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)
    """Lines not told yet."""

    NAMED = 10

    def add(self, kind: str, what: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= self.NAMED:
            self.news.append(f"skipped: {what}")
            if self.counts[kind] == self.NAMED:
                self.news.append(f"more of the kind ({kind}) are counted, not named")

    def take_news(self) -> list[str]:
        news, self.news = self.news, []
        return news

    def in_words(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())


BAD_RECORD, NO_PICTURE, BAD_PICTURE, TOO_LONG = (
    "unusable records",
    "records whose picture is missing",
    "samples with an unreadable picture",
    "samples cut off before their answer",
)
OnBad = Literal["skip", "refuse"]


class VisualDataset:
    """The samples of a data set by their number, and which of them make up a step.

    All records are looked at once, at the start: those that cannot be used are left out.
    features_of: gives the encoder's features of a picture by its name, in place of the pixels.
    """

    def __init__(
        self,
        records: Records,
        pictures: PictureStore,
        assembly: Assembly,
        preprocessing: Preprocessing,
        *,
        ctx_len: int,
        on_bad: OnBad = "skip",
        num_workers: int = 1,
        features_of: Callable[[str], np.ndarray | Tensor] | None = None,
    ) -> None:
        self.records, self.pictures, self.assembly = records, pictures, assembly
        self.preprocessing, self.ctx_len, self.on_bad = preprocessing, ctx_len, on_bad
        self.features_of = features_of
        self.problems = Problems()
        self._workers = ThreadPoolExecutor(num_workers, "pictures")
        self._told = threading.Lock()
        self._told_of: set[int] = set()
        self.lengths = self._look_at_all()
        """Tokens of each usable sample, pictures included; int32."""

    def __len__(self) -> int:
        return len(self._usable)

    @property
    def text_tokens(self) -> float:
        """Mean number per sample, pictures not counted."""
        return float((self.lengths - self._image_lengths).mean())

    @property
    def visual_tokens(self) -> float:
        """Mean number per sample."""
        return float(self._image_lengths.mean())

    @property
    def label_tokens(self) -> float:
        """Mean number per sample of tokens that are learned."""
        return float(self._label_lengths.mean())

    def picture_names(self) -> list[str]:
        """Of all usable samples, each once."""
        found: dict[str, None] = {}
        for number in self._usable.tolist():
            found.update(dict.fromkeys(picture_names(self.records[number])))
        return list(found)

    def sample(self, number: int) -> Sample:
        return self.assembly.sample(self.records[int(self._usable[number])])

    def batch(self, numbers: Sequence[int]) -> VisualBatch:
        """These samples, less those whose picture cannot be read; one row without targets when none
        is left."""
        samples = [self.sample(n) for n in numbers]
        seen = list(self._workers.map(self._see, numbers, samples))
        kept = [s for s, found in zip(samples, seen, strict=True) if found is not None]
        arrays = [a for found in seen if found is not None for a in found]
        if not kept:
            nothing = np.zeros(LENGTH_MULTIPLE, dtype=np.int64)
            kept = [Sample(nothing, np.full_like(nothing, IGNORED_TARGET), nothing.astype(bool))]
        if arrays and self.features_of is not None:
            features = torch.stack([torch.as_tensor(a) for a in arrays])
            return self._collated(kept, None, features)
        height, width = self.preprocessing.shape
        empty = np.zeros((0, 3, height, width), dtype=np.uint8)
        return self._collated(kept, np.stack(arrays) if arrays else empty, None)

    def _collated(
        self, samples: list[Sample], pixels: np.ndarray | None, features: Tensor | None
    ) -> VisualBatch:
        return collate(
            samples,
            self.ctx_len,
            pixels=pixels,
            features=features,
        )

    def try_pixels(self, name: str) -> np.ndarray | None:
        """Of one picture; None when it cannot be read."""
        try:
            return self.preprocessing.pixels(self.pictures.open(name))
        except PictureError:
            return None

    def _see(self, number: int, sample: Sample) -> list[np.ndarray | Tensor] | None:
        """What the model gets of a sample's pictures; None when one of them cannot be read."""
        try:
            return [self._picture(name) for name in sample.pictures]
        except PictureError as error:
            self._bad_picture(number, str(error))
            return None

    def _picture(self, name: str) -> np.ndarray | Tensor:
        if self.features_of is not None:
            return self.features_of(name)
        return self.preprocessing.pixels(self.pictures.open(name))

    def _bad_picture(self, number: int, reason: str) -> None:
        """Note a sample that contributes nothing, once however often it comes."""
        with self._told:
            if number in self._told_of:
                return
            self._told_of.add(number)
            place = int(self._usable[number])
            self._unusable(BAD_PICTURE, place, self.records[place], reason)
            if len(self._told_of) == len(self):
                raise UserError(f"no sample has a picture that can be read; the last: {reason}")

    def _look_at_all(self) -> np.ndarray:
        usable, lengths, images, labels = [], [], [], []
        for number in range(len(self.records)):
            record = self.records[number]
            try:
                sample = self.assembly.sample(record)
                missing = [n for n in sample.pictures if self.pictures.find(n) is None]
            except UserError as error:
                self._unusable(BAD_RECORD, number, record, str(error))
                continue
            if missing:
                places = self.pictures.where_it_looks()
                self._unusable(NO_PICTURE, number, record, f"{missing[0]} is not in {places}")
                continue
            if not (sample.labels[: self.ctx_len + 1] != IGNORED_TARGET).any():
                reason = f"its answer lies beyond ctx_len {self.ctx_len}"
                self._unusable(TOO_LONG, number, record, reason)
                continue
            usable.append(number)
            lengths.append(len(sample.ids))
            images.append(int(sample.is_image.sum()))
            labels.append(int((sample.labels != IGNORED_TARGET).sum()))
        if not usable:
            reasons = f": {self.problems.in_words()}; {self.problems.news[0]}"
            raise UserError(
                "none of the records can be used" + (reasons if self.problems.counts else "")
            )
        self._usable = np.array(usable, dtype=np.int64)
        self._image_lengths = np.array(images, dtype=np.int32)
        self._label_lengths = np.array(labels, dtype=np.int32)
        return np.array(lengths, dtype=np.int32)

    def _unusable(self, kind: str, number: int, record: Mapping[str, Any], reason: str) -> None:
        name = f"record {number + 1}" + (f" (id {record['id']})" if "id" in record else "")
        if self.on_bad == "refuse":
            raise UserError(f"{name}: {reason} (--on_bad_data skip counts and leaves out such)")
        self.problems.add(kind, f"{name}: {reason}")


class BucketedOrder:
    """Which samples make up each step and micro-batch: a pure function of the step's number.

    Each pass is a seeded shuffle. The samples of a window, of at most `window_steps` steps, are
    sorted by length and laid out in steps, whose order is shuffled, so that what is padded together
    has about one length. Where a pass has few windows they fill it evenly: a run of one pass that
    ended inside a window would miss some lengths and see others twice. A step has the same samples
    however it is divided into micro-batches.
    """

    def __init__(
        self, lengths: np.ndarray, *, global_bsz: int, window_steps: int, seed: int, shuffle: bool
    ) -> None:
        assert len(lengths) and global_bsz > 0 and window_steps > 0
        self.lengths, self.global_bsz = lengths, global_bsz
        steps_per_pass = max(1, len(lengths) // global_bsz)
        windows = -(-steps_per_pass // window_steps)
        # Of more windows than one has steps, what is left over would not become less.
        is_few = windows <= window_steps
        self.window_steps = steps_per_pass // windows if is_few else window_steps
        self.seed, self.shuffle = seed, shuffle
        self._steps_of = lru_cache(maxsize=2)(self._window)
        self._order_of = lru_cache(maxsize=2)(self._pass)

    def step(self, number: int) -> np.ndarray:
        """[global_bsz] samples of optimizer step `number`, shortest first."""
        window, place = divmod(number, self.window_steps)
        samples: np.ndarray = self._steps_of(window)[place]
        return samples

    def micro_batches(
        self, step: int, *, micro_bsz: int, rank: int = 0, world_size: int = 1
    ) -> list[np.ndarray]:
        """This rank's share of a step: every rank gets samples of about the same lengths."""
        rows = self.step(step).reshape(-1, world_size, micro_bsz)
        return [row[rank] for row in rows]

    def _window(self, window: int) -> np.ndarray:
        size = self.window_steps * self.global_bsz
        numbers = np.arange(window * size, (window + 1) * size)
        passes, places = np.divmod(numbers, len(self.lengths))
        samples = np.concatenate(
            [self._order_of(int(p))[places[passes == p]] for p in np.unique(passes)]
        )
        by_length = samples[np.argsort(self.lengths[samples], kind="stable")]
        steps = by_length.reshape(self.window_steps, self.global_bsz)
        if self.shuffle:
            steps = steps[np.random.default_rng([self.seed, 1, window]).permutation(len(steps))]
        return steps

    def _pass(self, number: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, 0, number]).permutation(len(self.lengths))
