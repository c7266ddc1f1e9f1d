"""The pictures of the vision demo: drawn shapes, and the handwritten digits of scikit-learn, in a
colour and at a place each.

Every fifth combination of colour with shape or digit and place is never drawn for training, and
the last fifth of the handwritten digits is never shown in training either.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from rwkvtune.errors import UserError

SIDE = 48
"""Height and width of a picture."""
COLOURS = {
    "red": (225, 50, 50), "green": (50, 185, 75), "blue": (60, 95, 230), "yellow": (235, 210, 50),
    "purple": (150, 60, 190), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIGITS = tuple("0123456789")
PLACES = {
    "top left": (14, 14), "top right": (34, 14), "bottom left": (14, 34), "bottom right": (34, 34),
    "middle": (24, 24),
}  # fmt: skip
"""(x, y) of the middle of a thing."""
DESCRIBED = 0.8
"""Share of the dialogues in words that begin with a description of what they are about."""
QUESTIONS = {"colour": "Which colour?", "thing": "What is it?", "place": "Where is it?"}


@dataclass(frozen=True)
class Scene:
    colour: str
    thing: str
    """A shape, or a digit."""
    place: str

    @property
    def is_held_out(self) -> bool:
        """A Latin square: each colour, thing and place is met in training, with all others."""
        things = SHAPES if self.thing in SHAPES else DIGITS
        numbers = (
            list(COLOURS).index(self.colour),
            things.index(self.thing),
            list(PLACES).index(self.place),
        )
        return sum(numbers) % 5 == 0

    @property
    def caption(self) -> str:
        kind = self.thing if self.thing in SHAPES else f"digit {self.thing}"
        where = "in the middle" if self.place == "middle" else f"at the {self.place}"
        return f"a {self.colour} {kind} {where}"

    def answer(self, question: str) -> str:
        return {"colour": self.colour, "thing": self.thing, "place": self.place}[question]


def scenes(*, held_out: bool) -> list[Scene]:
    every = [Scene(c, t, p) for c in COLOURS for t in (*SHAPES, *DIGITS) for p in PLACES]
    return [scene for scene in every if scene.is_held_out == held_out]


class Painter:
    """Draws scenes, each time a little differently."""

    def __init__(self, *, held_out: bool, seed: int) -> None:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise UserError(
                "the demo's handwritten digits come with scikit-learn: pip install scikit-learn"
            ) from error
        images, labels = load_digits(return_X_y=True)
        first = len(images) * 4 // 5
        chosen = slice(first, None) if held_out else slice(first)
        self._images, self._labels = images[chosen].reshape(-1, 8, 8), labels[chosen]
        self._random = np.random.default_rng(seed)

    def paint(self, scene: Scene) -> np.ndarray:
        """uint8 [SIDE, SIDE, 3]."""
        random = self._random
        mask = self._mask(scene)[:, :, None]
        ground = random.integers(0, 60) + random.normal(0, 6, (SIDE, SIDE, 3))
        colour = np.array(COLOURS[scene.colour]) * random.uniform(0.85, 1.05)
        pixels: np.ndarray = ground * (1 - mask) + colour * mask
        return pixels.clip(0, 255).astype(np.uint8)

    def _mask(self, scene: Scene) -> np.ndarray:
        """Where the thing is, 0 to 1."""
        from PIL import Image, ImageDraw

        random = self._random
        x, y = np.array(PLACES[scene.place]) + random.integers(-2, 3, 2)
        half = int(random.integers(8, 11))
        canvas = Image.new("L", (SIDE, SIDE))
        draw = ImageDraw.Draw(canvas)
        box = (x - half, y - half, x + half, y + half)
        match scene.thing:
            case "circle":
                draw.ellipse(box, fill=255)
            case "square":
                draw.rectangle(box, fill=255)
            case "triangle":
                draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=255)
            case "cross":
                draw.rectangle((x - half, y - 2, x + half, y + 2), fill=255)
                draw.rectangle((x - 2, y - half, x + 2, y + half), fill=255)
            case "ring":
                draw.ellipse(box, outline=255, width=3)
            case digit:
                of_it = self._images[self._labels == int(digit)]
                strokes = of_it[random.integers(len(of_it))] * (255 / 16)
                size = (2 * half + 4, 2 * half + 4)
                picture = Image.fromarray(strokes.astype(np.uint8))
                canvas.paste(
                    picture.resize(size, Image.Resampling.BILINEAR), (box[0] - 2, box[1] - 2)
                )
        mask: np.ndarray = np.asarray(canvas, dtype=np.float64) / 255
        return mask


def write_data(folder: Path, *, pictures: int, seed: int) -> None:
    """Training data in LLaVA's format: chat.json and images.zip, with two records per picture, one
    that describes it and one that asks about it; and the same dialogues in words alone, with the
    description, mostly, where the picture stands: text.jsonl, and its words: vocabulary.txt."""
    painter, random = Painter(held_out=False, seed=seed), np.random.default_rng(seed + 1)
    every = scenes(held_out=False)
    records: list[dict[str, Any]] = []
    texts = []
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(pictures):
            scene = every[int(random.integers(len(every)))]
            name = f"{number:05}.png"
            archive.writestr(name, as_png(painter.paint(scene)))
            order = random.permutation(list(QUESTIONS))
            for turns in (
                [("Describe the picture.", scene.caption)],
                [(QUESTIONS[q], scene.answer(q)) for q in order],
            ):
                records.append(_record(name, turns))
                before = scene.caption if random.random() < DESCRIBED else ""
                texts.append(before + _dialogue(turns))
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocabulary.txt").write_text(_vocabulary(texts), encoding="utf-8")
    (folder / "chat.json").write_text(json.dumps(records), encoding="utf-8")


def _dialogue(turns: list[tuple[str, str]]) -> str:
    return "".join(f"\x16User: {asked}\x17\x16Assistant: {said}\x17" for asked, said in turns)


def _vocabulary(texts: list[str]) -> str:
    """The words of some texts, each with the space before it, and all bytes; in RWKV's format."""
    words = {word for text in texts for word in re.findall(r" [A-Za-z]+|[A-Za-z]{2,}", text)}
    every = [bytes([byte]) for byte in range(256)]
    tokens = [repr(byte if byte[0] > 127 else byte.decode()) for byte in every]
    lengths = [1] * 256 + [len(word) for word in sorted(words)]
    tokens += map(repr, sorted(words))
    numbers = range(1, len(tokens) + 1)
    lines = zip(numbers, tokens, lengths, strict=True)
    return "".join(f"{number} {token} {length}\n" for number, token, length in lines)


def _record(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    conversation = []
    for i, (question, answer) in enumerate(turns):
        asked = f"<image>\n{question}" if i == 0 else question
        conversation += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name.removesuffix(".png"), "image": name, "conversations": conversation}


def write_questions(folder: Path, *, pictures: int, seed: int) -> None:
    """questions.jsonl and images.zip of scenes that training has never shown."""
    painter, random = Painter(held_out=True, seed=seed), np.random.default_rng(seed + 1)
    every = scenes(held_out=True)
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(pictures):
            scene = every[int(random.integers(len(every)))]
            name = f"{number:05}.png"
            archive.writestr(name, as_png(painter.paint(scene)))
            kind = "shape" if scene.thing in SHAPES else "digit"
            for question, text in QUESTIONS.items():
                group = f"which {kind}" if question == "thing" else question
                line = {"image": name, "text": text, "answer": scene.answer(question)}
                lines.append(json.dumps(line | {"group": group}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
