"""What alternating models answer, and where their last prompt token looks.

Multiple choice is scored by the likelihood of each option's text after the prompt, not by what the
model happens to write. Attention is measured at the last position alone, layer by layer, without
keeping any T x T matrix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkvtune.data.llava import stream_records
from rwkvtune.data.llava_dataset import Template
from rwkvtune.data.llava_images import ImageProcessor, open_picture
from rwkvtune.data.llava_manifest import IMAGE_TOKEN, pictures_of
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.evaluation.texts import wilson
from rwkvtune.files import atomic_write

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about pictures on the disk."""

    id: str
    text: str
    """With one <image> for each picture."""
    pictures: tuple[Path, ...]
    options: tuple[str, ...]
    """What the answer may be, such as "A" or "(A)"."""
    answer: int
    """Index of the right option."""


def read_questions(path: str | Path, *, image_folder: str = "") -> list[Question]:
    """Questions of a .json or .jsonl file, in one of two forms.

    BLINK's: {"question", "prompt"?, "choices"?, "answer": "(B)", "image_1", "image_2", ...}.
    LLaVA's: {"image", "conversations"}, the last turn being the right letter; `options` or A to D.
    UserError that names the sample for what is neither.
    """
    path = Path(path)
    folder = Path(image_folder) if image_folder else path.parent
    found = []
    for number, (_, record) in enumerate(stream_records(path), start=1):
        try:
            question = _question(record, folder, number)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{path}: sample {number} is no question: {error}") from error
        for picture in question.pictures:
            if not picture.exists():
                raise MissingFileError(f"{path}: sample {number}: there is no picture {picture}")
        found.append(question)
    if not found:
        raise UserError(f"{path} has no questions")
    return found


def _question(record: dict[str, Any], folder: Path, number: int) -> Question:
    name = str(record.get("id", record.get("idx", number)))
    if "conversations" in record:
        turns = record["conversations"]
        text = str(turns[-2]["value"])
        options = tuple(record.get("options", LETTERS[:4]))
        answer = str(turns[-1]["value"]).strip()
        if answer not in options:
            raise ValueError(f"the answer {answer!r} is none of the options {options}")
        pictures = tuple(pictures_of(record, folder))
        if text.count(IMAGE_TOKEN) != len(pictures):
            raise ValueError(f"{len(pictures)} images for {text.count(IMAGE_TOKEN)} <image>")
        return Question(name, text, pictures, options, options.index(answer))
    keys = sorted((k for k in record if re.fullmatch(r"image_\d+", k)), key=lambda k: int(k[6:]))
    pictures = tuple(folder / record[key] for key in keys if record[key])
    if not pictures:
        raise ValueError("it has neither `conversations` nor `image_1`")
    letter = re.search(r"[A-H]", str(record["answer"]).upper())
    if letter is None:
        raise ValueError(f"the answer {record['answer']!r} has no letter")
    count = len(record.get("choices", LETTERS[:4]))
    lines = [f"Image {i}: {IMAGE_TOKEN}" for i in range(1, len(pictures) + 1)]
    lines.append(str(record.get("prompt", record["question"])))
    lines.append("Answer with the letter of the right choice.")
    options = tuple(LETTERS[:count])
    return Question(name, "\n".join(lines), pictures, options, options.index(letter[0]))


@dataclass(frozen=True)
class Answered:
    question: Question
    log_likelihoods: tuple[float, ...]
    """Of each option's text after the prompt, in nats, summed over its tokens."""

    @property
    def choice(self) -> int:
        return int(np.argmax(self.log_likelihoods))

    @property
    def is_right(self) -> bool:
        return self.choice == self.question.answer


class Prompts:
    """Questions as what a composed model takes."""

    def __init__(self, tokenizer: Any, processor: ImageProcessor, version: str = "qwen_2") -> None:
        self.tokenizer, self.processor = tokenizer, processor
        self.template = Template(tokenizer, version)

    def inputs(self, question: Question) -> dict[str, Any]:
        """input_ids [1, T] up to the answer, and the views of its pictures."""
        ids = self.template.prompt(question.text)
        alone = len(question.pictures) == 1
        opened = [open_picture(path) for path in question.pictures]
        batch: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if opened:
            batch["images"] = [self.processor.views(p, alone=alone) for p in opened]
            batch["image_sizes"] = [p.size for p in opened]
        return batch

    def option_ids(self, option: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(option, add_special_tokens=False)
        return ids


@torch.no_grad()
def answer(model: Any, prompts: Prompts, questions: Sequence[Question]) -> Iterator[Answered]:
    """The log-likelihood of each option of each question, one question after the other: its options
    are the rows of one batch."""
    model.eval()
    for question in questions:
        inputs = prompts.inputs(question)
        options = [prompts.option_ids(option) for option in question.options]
        width = max(map(len, options))
        prompt = inputs.pop("input_ids")[0].tolist()
        ids = torch.tensor([prompt + o + [0] * (width - len(o)) for o in options])
        keep = torch.tensor(
            [[1] * (len(prompt) + len(o)) + [0] * (width - len(o)) for o in options]
        )
        if "images" in inputs:
            inputs = {
                "images": inputs["images"] * len(options),
                "image_sizes": inputs["image_sizes"] * len(options),
            }
        logits = model(input_ids=ids, attention_mask=keep, **inputs).logits
        yield Answered(question, tuple(_scores(logits, options, width)))


def _scores(logits: Tensor, options: Sequence[Sequence[int]], width: int) -> Iterator[float]:
    """Rows end in `width` positions of option and padding; each is predicted one earlier."""
    tail = logits[:, -width - 1 : -1].float().log_softmax(-1)  # [options, width, V]
    for row, option in zip(tail, options, strict=True):
        yield float(row[torch.arange(len(option)), torch.tensor(option)].sum())


@dataclass(frozen=True)
class Accuracy:
    right: int
    total: int

    @property
    def value(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return wilson(self.value, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def accuracy_of(answers: Sequence[Answered]) -> Accuracy:
    return Accuracy(sum(a.is_right for a in answers), len(answers))


def confusion(answers: Sequence[Answered]) -> list[list[int]]:
    """[right option][chosen option]: how often."""
    size = max(len(a.question.options) for a in answers)
    table = [[0] * size for _ in range(size)]
    for a in answers:
        table[a.question.answer][a.choice] += 1
    return table


def paired_difference(
    ours: Sequence[Answered], theirs: Sequence[Answered], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(accuracy of ours minus theirs, and its 95 % bootstrap interval) on the same questions."""
    differences = np.array(
        [int(a.is_right) - int(b.is_right) for a, b in zip(ours, theirs, strict=True)]
    )
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(differences), (draws, len(differences)))
    low, high = np.percentile(differences[picks].mean(1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


@dataclass(frozen=True)
class VisualAttention:
    """Shares of the last prompt token's attention, of one sample."""

    by_head: Tensor
    """[layers, heads]: on all visual tokens."""
    by_image: Tensor
    """[layers, images], mean over heads: on the tokens of each image."""


class LastRowAttention:
    """Measures what the last position of a forward pass attends to: `with LastRowAttention(model)
    as seen: model(...)`, then `seen.weights` is [layers, heads, T].

    It recomputes one row from each layer's queries and keys, so it works with every attention
    function and keeps no T x T tensor.
    """

    def __init__(self, model: Any) -> None:
        self.layers = model.get_decoder().layers
        self.rows: list[Tensor] = []

    def __enter__(self) -> LastRowAttention:
        self._hooks = [
            layer.self_attn.register_forward_pre_hook(self._note, with_kwargs=True)
            for layer in self.layers
        ]
        return self

    def __exit__(self, *unused: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def weights(self) -> Tensor:
        return torch.stack(self.rows)

    def _note(self, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"]  # [1, T, D]
        cos, sin = kwargs["position_embeddings"]
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        query = attention.q_proj(hidden[:, -1:]).view(1, 1, -1, attention.head_dim)
        key = attention.k_proj(hidden).view(shape)
        query = _rotated(query, cos[:, -1:], sin[:, -1:])[0, 0]  # [H, N]
        key = _rotated(key, cos, sin)[0].repeat_interleave(attention.num_key_value_groups, 1)
        scores = torch.einsum("hn,thn->ht", query, key) * attention.scaling
        allowed = last_row(kwargs.get("attention_mask"), hidden.shape[1], hidden.device)
        self.rows.append(scores.masked_fill(~allowed, -math.inf).float().softmax(-1))


def last_row(mask: Any, length: int, device: torch.device) -> Tensor:
    """Which keys [T] the last query may see, from any of the decoder's masks of a single row."""
    if mask is None:
        return torch.ones(length, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor):
        row = mask[0, 0, -1, :length]
        return row if row.dtype == torch.bool else row == 0
    allowed = torch.zeros(length, dtype=torch.bool, device=device)
    for _, positions in mask.groups:  # a Split: the group that has the last position
        if int(positions[-1]) == length - 1:
            allowed[positions] = True
    return allowed


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, T, H, N] with the rotary embedding of its positions."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@torch.no_grad()
def visual_attention(model: Any, inputs: dict[str, Any]) -> VisualAttention:
    """Of one sample with images: input_ids [1, T] with -200, images, image_sizes."""
    ids = inputs["input_ids"]
    modalities = inputs.get("modalities") or ["image"] * len(inputs["images"])
    features = model.visual_features(inputs["images"], inputs["image_sizes"], modalities)
    spliced = model.splice(ids, inputs["images"], inputs["image_sizes"], modalities)
    with LastRowAttention(model) as seen:
        keywords = {"modality_ids": spliced.modality_ids} if model.is_alternating else {}
        model(inputs_embeds=spliced.inputs_embeds, **keywords)
    weights = seen.weights  # [layers, heads, T]
    is_visual = spliced.modality_ids[0].bool()
    places = is_visual.nonzero()[:, 0]
    by_image = []
    for part in places.split([len(f) for f in features if len(f)]):
        by_image.append(weights[:, :, part].sum(-1).mean(1))
    return VisualAttention(weights[:, :, is_visual].sum(-1), torch.stack(by_image, dim=1))


def write_answers(path: Path, answers: Sequence[Answered]) -> None:
    """One JSON object a line: id, right and chosen option, log-likelihoods."""
    lines = [
        json.dumps(
            {
                "id": a.question.id,
                "right": a.question.options[a.question.answer],
                "chosen": a.question.options[a.choice],
                "log_likelihoods": dict(zip(a.question.options, a.log_likelihoods, strict=True)),
            }
        )
        for a in answers
    ]
    content = ("\n".join(lines) + "\n").encode()
    atomic_write(path, lambda file: file.write(content))
