"""Scores of answers about pictures: exact match of what is written, and the likeliest option."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvtune.data.images import PictureError, PictureStore
from rwkvtune.data.llava import picture_names, stream_records
from rwkvtune.data.visual import TURN_END, Sample
from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write
from rwkvtune.inference.generate import evaluating
from rwkvtune.inference.vision import VisionSystem, log_likelihoods, read_prompt


@dataclass(frozen=True)
class Question:
    number: int
    """Its place in the file, from 0."""
    text: str
    answers: tuple[str, ...]
    """Any of them counts as right; none: it is only answered."""
    options: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    group: str = ""
    """Scores are told by groups too."""


@dataclass
class Answer:
    question: Question
    said: str
    is_right: bool | None
    """What was written is one of the answers; None where none is known."""
    chosen: str | None = None
    """The likeliest option."""
    chosen_is_right: bool | None = None


@dataclass
class Scores:
    answers: list[Answer]
    skipped: list[str] = field(default_factory=list)
    """Why a question was left out, a line each."""

    def rows(self) -> list[dict[str, Any]]:
        """A row for all questions and, where there are groups, one for each."""
        groups = sorted({a.question.group for a in self.answers} - {""})
        return [_row("all", self.answers)] + [
            _row(group, [a for a in self.answers if a.question.group == group]) for group in groups
        ]

    def write(self, path: Path) -> None:
        """Everything as JSON."""
        content = {
            "scores": self.rows(),
            "skipped": self.skipped,
            "answers": [asdict(answer) for answer in self.answers],
        }
        atomic_write(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def _row(name: str, answers: Sequence[Answer]) -> dict[str, Any]:
    exact = [a.is_right for a in answers if a.is_right is not None]
    chosen = [a.chosen_is_right for a in answers if a.chosen_is_right is not None]
    return {"questions": name, "count": len(answers)} | {
        name: None
        if not values
        else {
            "accuracy": sum(values) / len(values),
            "error": math.sqrt(_variance(values) / len(values)),
            "count": len(values),
        }
        for name, values in (("exact match", exact), ("likeliest option", chosen))
    }


def _variance(values: Sequence[bool]) -> float:
    mean = sum(values) / len(values)
    return mean * (1 - mean)


def table(scores: Scores) -> str:
    """The rows as text, in per cent with their standard errors."""
    rows = scores.rows()
    width = max(len(row["questions"]) for row in rows + [{"questions": "questions"}])
    lines = [
        f"{'questions':<{width}}  {'number':>6}  {'exact match':>14}  {'likeliest option':>16}"
    ]
    for row in rows:
        cells = [
            "-" if (cell := row[name]) is None
            else f"{100 * cell['accuracy']:.1f} ± {100 * cell['error']:.1f} %"
            for name in ("exact match", "likeliest option")
        ]  # fmt: skip
        lines.append(
            f"{row['questions']:<{width}}  {row['count']:>6}  {cells[0]:>14}  {cells[1]:>16}"
        )
    if scores.skipped:
        lines.append(f"skipped {len(scores.skipped)}: {'; '.join(scores.skipped[:3])}")
    return "\n".join(lines)


def read_questions(path: Path) -> list[Question]:
    """Questions of a file of JSON objects; UserError names the one that cannot be asked.

    text (or question) and answer (or answers) are needed; image, options and group are not.
    """
    questions = [
        _question(record, number, path) for number, (_, record) in enumerate(stream_records(path))
    ]
    if not questions:
        raise UserError(f"{path} has no questions in it")
    return questions


def _question(record: Mapping[str, Any], number: int, path: Path) -> Question:
    where = f"{path}: question {number + 1}"
    text = record.get("text", record.get("question"))
    if not isinstance(text, str) or not text:
        raise UserError(f"{where} has no text: expected a string under text or question")
    given = record.get("answer", record.get("answers", []))
    answers = [given] if isinstance(given, str) else given
    options = record.get("options", [])
    for name, values in (("answer", answers), ("options", options)):
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise UserError(f"{where}: {name} is {values!r}, expected text or a list of texts")
    try:
        pictures = picture_names(dict(record))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Question(
        number, text, tuple(answers), tuple(options), tuple(pictures), str(record.get("group", ""))
    )


def evaluate_questions(
    system: VisionSystem,
    questions: Sequence[Question],
    *,
    picture_folder: Path,
    max_tokens: int = 64,
    batch_size: int = 16,
    with_pictures: bool = True,
) -> Scores:
    """Ask them all, greedily.

    with_pictures: False asks them in words alone, to see what these tell. Questions whose picture
    cannot be read are left out and named.
    """
    store = PictureStore(picture_folder)
    scores = Scores([])
    for part in _of_equal_length(system, questions, batch_size, with_pictures):
        kept, pictures = [], []
        for question, sample in part:
            try:
                pictures += [store.open(name) for name in question.pictures if with_pictures]
            except PictureError as error:
                scores.skipped.append(f"question {question.number + 1}: {error}")
                continue
            kept.append((question, sample))
        if not kept:
            continue
        features = system.features(pictures) if pictures else None
        said = greedy(system, [sample for _, sample in kept], features, max_tokens)
        for row, (question, sample) in enumerate(kept):
            answer = Answer(question, said[row], _is_one_of(said[row], question.answers))
            if question.options:
                own = features
                if features is not None:
                    each = len(features) // len(kept)
                    own = features[row * each : (row + 1) * each]
                answer.chosen = likeliest(system, sample, question.options, own)
                answer.chosen_is_right = _is_one_of(answer.chosen, question.answers)
            scores.answers.append(answer)
    if not scores.answers:
        raise UserError(f"none of the questions can be asked: {'; '.join(scores.skipped[:3])}")
    scores.answers.sort(key=lambda answer: answer.question.number)
    return scores


def _of_equal_length(
    system: VisionSystem, questions: Sequence[Question], batch_size: int, with_pictures: bool
) -> Iterator[list[tuple[Question, Sample]]]:
    """Batches without padding: of equally many tokens, with pictures at the same places."""
    groups: dict[tuple[int, bytes], list[tuple[Question, Sample]]] = {}
    for question in questions:
        pictures = len(question.pictures) if with_pictures else 0
        sample = system.assembly.question(question.text, pictures=pictures)
        key = len(sample.ids), sample.is_image.tobytes()
        groups.setdefault(key, []).append((question, sample))
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def greedy(
    system: VisionSystem, samples: Sequence[Sample], features: Tensor | None, max_tokens: int
) -> list[str]:
    """What is written after each of several prompts of one length."""
    tokenizer, llm = system.tokenizer, system.model.llm
    ends = torch.tensor([0, *tokenizer.encode(TURN_END)], device=system.device)
    banned = torch.tensor(system.banned_ids, dtype=torch.long, device=system.device)
    state = read_prompt(system, samples, features, None)
    ids = torch.tensor([[int(sample.ids[-1])] for sample in samples], device=system.device)
    written: list[list[int]] = [[] for _ in samples]
    is_over = torch.zeros(len(samples), dtype=torch.bool, device=system.device)
    with evaluating(llm):
        for _ in range(max_tokens):
            logits, state = llm(ids, state)
            ids = logits[:, -1:].index_fill(-1, banned, -math.inf).argmax(dim=-1)
            is_over |= torch.isin(ids[:, 0], ends)
            if is_over.all():
                break
            for row, id in enumerate(ids[:, 0].tolist()):
                if not is_over[row]:
                    written[row].append(id)
    return [tokenizer.decode(ids).strip() for ids in written]


def likeliest(
    system: VisionSystem, prompt: Sample, options: Sequence[str], features: Tensor | None
) -> str:
    """The option with the highest probability as the whole answer, its end mark included."""
    samples = [_answered(system, prompt, option) for option in options]
    repeated = None if features is None else features.repeat(len(options), 1, 1)
    likelihoods = log_likelihoods(system, samples, repeated)
    return options[int(likelihoods.argmax())]


def _answered(system: VisionSystem, prompt: Sample, text: str) -> Sample:
    answer = torch.tensor(system.assembly.answer(text))
    pad = (0, len(answer))
    ids = F.pad(torch.from_numpy(prompt.ids), pad)
    ids[len(prompt.ids) :] = answer
    labels = F.pad(torch.from_numpy(prompt.labels), pad)
    labels[len(prompt.ids) :] = answer
    is_image = F.pad(torch.from_numpy(prompt.is_image), pad)
    return Sample(ids.numpy(), labels.numpy(), is_image.numpy(), prompt.pictures)


def _is_one_of(said: str, answers: Sequence[str]) -> bool | None:
    return normalized(said) in map(normalized, answers) if answers else None


def normalized(text: str) -> str:
    """Without case, outer white space and an end mark."""
    return " ".join(text.lower().split()).rstrip(".!").strip()
