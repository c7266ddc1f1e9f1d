"""LLaVA's samples as what a model trains on: ids with -200 for each image, labels, views.

module = make_supervised_data_module(tokenizer, DataArguments(data_path="samples.json"))
batch = module["data_collator"]([module["train_dataset"][i] for i in range(4)])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rwkvtune.data.llava_images import ImageProcessor, open_picture, sampled_frames
from rwkvtune.data.llava_manifest import (
    IMAGE_TOKEN,
    Record,
    check_records,
    frames_of,
    from_the_user_on,
    num_words,
    pictures_of,
    read_manifest,
    turns_of,
)
from rwkvtune.errors import UserError

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
WORDS_PER_IMAGE = 128
"""What an image counts in `lengths`, in words."""

LabelMode = Literal["llava", "assistant_only"]

SYSTEM_LINES = {
    "qwen_1_5": "You are a helpful assistant.",
    "qwen_2": "You are a helpful assistant.",
    "qwen_2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
}
VERSIONS = (*SYSTEM_LINES, "plain")


@dataclass
class DataArguments:
    """What a data module is made from; the names and defaults are LLaVA's where it has them."""

    data_path: str = ""
    image_folder: str = ""
    """Where relative paths of images begin; empty = at the manifest."""
    video_folder: str = ""
    """Where relative paths of frames begin; empty = at the manifest."""
    version: str = "qwen_2"
    """Conversation template: qwen_1_5, qwen_2, qwen_2_5 or plain."""
    label_mode: LabelMode = "llava"
    """llava: also the assistant's header, and every newline and turn marker; assistant_only: the
    answers and their end."""
    is_multimodal: bool = True
    lazy_preprocess: bool = True
    """Images are always read when their sample is needed."""
    early_mix_text: bool = False
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: Any = "(1x1),...,(6x6)"
    image_processor: ImageProcessor | None = None
    """None = SigLIP's 384 pixels with this aspect ratio."""
    mm_use_im_start_end: bool = False
    video_fps: float = 1.0
    """Frames per second of the frame lists, for add_time_instruction."""
    frames_upbound: int = 0
    """Frames of a video that are used, at equal distances; 0 = all."""
    force_sample: bool = False
    add_time_instruction: bool = False
    """Say before the question how long the video is and when its frames are."""
    seed: int = 0
    """For random sampling strategies."""


def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """{"train_dataset", "eval_dataset": None, "data_collator"} for a Trainer.

    data_args: a DataArguments, or any object with some of its fields. UserError, before any image
    is read, for a manifest that cannot be used.
    """
    arguments = DataArguments()
    for field in dataclasses.fields(DataArguments):
        if getattr(data_args, field.name, None) is not None:
            setattr(arguments, field.name, getattr(data_args, field.name))
    dataset = LlavaDataset(tokenizer, arguments)
    collator = LlavaCollator(tokenizer, dataset.processor)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


class LlavaDataset(Dataset[dict[str, Any]]):
    """Samples of a manifest; `[i]` gives input_ids [T], labels [T], `image` and the id.

    image: a list of (views [n, 3, S, S], (width, height), "image" or "video").
    """

    def __init__(self, tokenizer: Any, arguments: DataArguments) -> None:
        if arguments.version not in VERSIONS:
            raise UserError(
                f"version={arguments.version} is no conversation template that is known here: "
                f"choose one of {', '.join(VERSIONS)}"
            )
        self.tokenizer, self.arguments = tokenizer, arguments
        self.processor = arguments.image_processor or ImageProcessor(
            image_aspect_ratio=arguments.image_aspect_ratio,
            image_grid_pinpoints=arguments.image_grid_pinpoints,
        )
        self.template = Template(tokenizer, arguments.version, arguments.label_mode)
        self.list_data_dict = read_manifest(arguments.data_path, seed=arguments.seed)

    def check(self) -> None:
        """UserError that names the samples which cannot be trained on, before any is read."""
        if not self.list_data_dict:
            raise UserError(f"{self.arguments.data_path} has no samples")
        check_records(self.list_data_dict, self.folder_of)

    def folder_of(self, index: int, record: Record) -> Path:
        """Where a sample's relative paths begin."""
        given = self.arguments.video_folder if "video" in record else self.arguments.image_folder
        return Path(given) if given else self.list_data_dict.folder(index)

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def has_pictures(self) -> bool:
        return any("image" in r or "video" in r for r in self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, and 128 for one with images."""
        return [abs(n) + WORDS_PER_IMAGE * (n > 0) for n in self.modality_lengths]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each sample, negative for a text sample; never zero."""
        return [
            max(num_words(record), 1) * (1 if "image" in record or "video" in record else -1)
            for record in self.list_data_dict
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: Record = self.list_data_dict[index]
        folder = self.folder_of(index, record)
        turns = turns_of(record)
        pictures = [open_picture(path) for path in pictures_of(record, folder)]
        alone = len(pictures) == 1
        image = [(self.processor.views(p, alone=alone), p.size, "image") for p in pictures]
        paths = frames_of(record, folder)
        if paths:
            chosen = sampled_frames(paths, self.arguments.frames_upbound)
            frames = [open_picture(paths[i]) for i in chosen]
            image = [(self.processor.frames(frames), frames[0].size, "video")]
            if self.arguments.add_time_instruction:
                turns = _with_times(turns, chosen, len(paths), self.arguments.video_fps)
        if self.arguments.is_multimodal:
            turns = [(role, self._with_markers(text)) for role, text in turns]
        ids, labels = self.template.encode(turns)
        item = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        return {**item, "image": image, "id": record.get("id", index)}

    def _with_markers(self, text: str) -> str:
        """A single <image> goes to the front of its turn."""
        if text.count(IMAGE_TOKEN) == 1 and not text.startswith(IMAGE_TOKEN):
            text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
        if self.arguments.mm_use_im_start_end:
            text = text.replace(IMAGE_TOKEN, f"<im_start>{IMAGE_TOKEN}<im_end>")
        return text


def _with_times(
    turns: list[tuple[str, str]], chosen: Sequence[int], total: int, fps: float
) -> list[tuple[str, str]]:
    times = ", ".join(f"{i / fps:.2f}s" for i in chosen)
    told = f"The video is {total / fps:.2f}s long; you see {len(chosen)} of its frames, at {times}."
    (role, text), *rest = turns
    question = text.replace(IMAGE_TOKEN, "").strip()
    return [(role, f"{IMAGE_TOKEN}\n{told}\n{question}"), *rest]


class Template:
    """A conversation as ids and labels.

    The Qwen templates are ChatML: each turn is `<|im_start|>role`, a newline, the text,
    `<|im_end|>` and a newline, after a system turn. UserError when the tokenizer lacks the markers.
    """

    def __init__(self, tokenizer: Any, version: str, label_mode: LabelMode = "llava") -> None:
        self.tokenizer, self.version, self.label_mode = tokenizer, version, label_mode
        if version == "plain":
            return
        start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        if None in (start, end) or start == end:
            raise UserError(
                f"version={version} needs a tokenizer with <|im_start|> and <|im_end|>, as Qwen's"
            )
        self.start, self.end = start, end
        self.newline: list[int] = tokenizer.encode("\n", add_special_tokens=False)
        self.always_labelled = {start, end, *self.newline}

    def encode(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """(ids, labels); -200 stands for each <image>, -100 is not learned."""
        if self.version == "plain":
            return self._plain(turns)
        system = SYSTEM_LINES[self.version]
        ids: list[int] = []
        labels: list[int] = []
        for role, text in [("system", system), *from_the_user_on(list(turns))]:
            turn = [*self._opened(role, text), self.end, *self.newline]
            ids += turn
            labels += self._labels(role, turn)
        return ids, [IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else i for i in labels]

    def _labels(self, role: str, turn: list[int]) -> list[int]:
        if self.label_mode == "llava":
            return [
                i if role == "assistant" or i in self.always_labelled else IGNORE_INDEX
                for i in turn
            ]
        if role != "assistant":
            return [IGNORE_INDEX] * len(turn)
        header = self._opened(role, "")
        if turn[: len(header)] != header:  # its newline has become one token with the text's
            header.pop()
        first, last = len(header), len(turn) - len(self.newline)
        return [IGNORE_INDEX] * first + turn[first:last] + [IGNORE_INDEX] * len(self.newline)

    def prompt(self, text: str) -> list[int]:
        """Ids of a question, up to where the assistant begins."""
        if self.version == "plain":
            return self._ids(text)
        turns = (("system", SYSTEM_LINES[self.version]), ("user", text))
        ids: list[int] = []
        for role, content in turns:
            ids += [*self._opened(role, content), self.end, *self.newline]
        return [*ids, *self._opened("assistant", "")]

    def _opened(self, role: str, text: str) -> list[int]:
        """A turn without its end. Role and text are one piece for the tokenizer, as in LLaVA:
        newlines at the beginning of a text are one token with that behind the role."""
        return [self.start, *self._ids(f"{role}\n{text}")]

    def _plain(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """The image and its caption; only the caption is learned."""
        answer = next(text for role, text in turns if role == "assistant")
        caption = self._ids(answer.replace(IMAGE_TOKEN, "") + "\n")
        images = sum(text.count(IMAGE_TOKEN) for _, text in turns)
        ids = [IMAGE_TOKEN_INDEX] * images + caption
        return ids, [IGNORE_INDEX] * images + caption

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(IMAGE_TOKEN)):
            if number:
                ids.append(IMAGE_TOKEN_INDEX)
            if part:
                ids += self.tokenizer.encode(part, add_special_tokens=False)
        return ids


@dataclass
class LlavaCollator:
    """Samples to one batch: input_ids, labels, attention_mask [B, T]; and, if any sample has
    images, `images` (views each), `image_sizes` ((width, height) each) and `modalities`.

    A sample without images in such a batch gets an entry "text" of one empty view.
    """

    tokenizer: Any
    processor: ImageProcessor

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        limit = self.tokenizer.model_max_length
        side = getattr(self.tokenizer, "padding_side", "right")
        pad = self.tokenizer.pad_token_id or 0

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side)

        ids = [sample["input_ids"][:limit] for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": padded(ids, pad),
            "labels": padded([sample["labels"][:limit] for sample in samples], IGNORE_INDEX),
            # By length: a real token may have the padding's id.
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        }
        if any(sample["image"] for sample in samples):
            size = self.processor.view_size
            absent = (torch.zeros(1, 3, size, size), (size, size), "text")
            # An image whose place lies beyond the limit goes with it.
            kept = [
                sample["image"][: int((row == IMAGE_TOKEN_INDEX).sum())]
                for sample, row in zip(samples, ids, strict=True)
            ]
            entries = [entry for images in kept for entry in (images or [absent])]
            batch["images"] = [views for views, _, _ in entries]
            batch["image_sizes"] = [size for _, size, _ in entries]
            batch["modalities"] = [kind for _, _, kind in entries]
        return batch

    def widths(self, batch: dict[str, Any]) -> Tensor:
        """How many positions each id of a batch takes in the decoder, [B, T]: an image its tokens,
        padding none, and nothing what lies beyond the longest length once the images are in."""
        entries = zip(
            batch.get("images", ()),
            batch.get("image_sizes", ()),
            batch.get("modalities", ()),
            strict=True,
        )
        lengths = [
            self.processor.video_tokens(len(views))
            if kind == "video"
            else self.processor.image_tokens(size, alone=len(views) > 1)
            for views, size, kind in entries
            if kind != "text"
        ]
        ids: Tensor = batch["input_ids"]
        widths: Tensor = batch["attention_mask"].clone()
        widths[ids == IMAGE_TOKEN_INDEX] = torch.tensor(lengths, dtype=widths.dtype).to(ids.device)
        ends = widths.cumsum(1).clamp(max=self.tokenizer.model_max_length)
        return ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1))
