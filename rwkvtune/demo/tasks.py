"""Small tasks on strings in chat form, whose answers can be checked to the letter."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from rwkvtune.files import atomic_write

Task = tuple[str, Callable[[str], str]]
"""(what the user says, what the assistant answers)"""

TASKS: dict[str, Task] = {
    "copy": ("copy {}", lambda word: word),
    "capitals": ("write {} in capitals", str.upper),
    "first letter": ("first letter of {}", lambda word: word[0]),
    "last letter": ("last letter of {}", lambda word: word[-1]),
    "reverse": ("reverse {}", lambda word: word[::-1]),
}
LETTER_TASKS: dict[str, Task] = {
    "first letter": ("first letter of {}", lambda word: word[0]),
    "last letter": ("last letter of {}", lambda word: word[-1]),
    "first, big": ("first letter of {} in capitals", lambda word: word[0].upper()),
}
REWORDED: dict[str, Task] = {
    "first letter": ("{} begins with?", lambda word: word[0]),
    "last letter": ("{} ends with?", lambda word: word[-1]),
    "first, big": ("{} begins with, big?", lambda word: word[0].upper()),
}
"""What LETTER_TASKS ask for, in other words."""

LENGTHS = range(3, 6)
HELD_OUT_PER_TASK = 60
SEED = 7


def write_tasks(
    training: Path,
    held_out: Path,
    *,
    count: int,
    tasks: Mapping[str, Task] = TASKS,
    letters: str = string.ascii_lowercase,
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Write `count` different conversations to train on and HELD_OUT_PER_TASK of each task whose
    words occur in no conversation of the other file; the same ones every time."""
    dice = random.Random(SEED)
    words: set[str] = set()
    while len(words) < count // len(tasks) + HELD_OUT_PER_TASK:
        words.add("".join(dice.choices(letters, k=dice.choice(lengths))))
    in_order = sorted(words)
    dice.shuffle(in_order)
    for path, chosen in (
        (held_out, in_order[:HELD_OUT_PER_TASK]),
        (training, in_order[HELD_OUT_PER_TASK:]),
    ):
        lines = [line_of(task, word, tasks) for word in chosen for task in tasks]
        atomic_write(path, partial(_write_text, text="".join(lines)))


def _write_text(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def line_of(task: str, word: str, tasks: Mapping[str, Task] = TASKS) -> str:
    question, answer = tasks[task]
    turns = [
        {"role": "user", "content": question.format(word)},
        {"role": "assistant", "content": answer(word)},
    ]
    return json.dumps({"task": task, "messages": turns}) + "\n"
