"""The synthetic visual-correspondence task: a point marked in one picture, four in another; which
of them is it?

Both pictures have four corners. In the first, one corner holds the marked point, a square of its
colour; in the second each corner holds a point of another colour: A top left, B top right, C
bottom left, D bottom right. The answer is the corner with the marked point's colour, so it needs
both pictures.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDE = 16
"""Pixels of a picture's side."""
LETTERS = "ABCD"
GREY = (128, 128, 128)
COLOURS = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
QUESTION = "<image><image>\nSame point?"


def write_task(folder: Path, *, train: int, test: int, seed: int = 0) -> tuple[Path, Path]:
    """Pictures, and manifests of `train` samples and `test` questions; returns the manifests.

    The pictures of the two parts are drawn from different seeds.
    """
    paths = []
    for name, count in (("train", train), ("test", test)):
        path = folder / f"{name}.json"
        if not path.exists():
            records = list(_samples(folder, name, count, seed))
            text = json.dumps(records)
            path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


def _samples(folder: Path, name: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    from PIL import Image

    chance = random.Random(f"{seed}-{name}")
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colours = chance.sample(COLOURS, 4)
        right = chance.randrange(4)
        first = Image.new("RGB", (SIDE, SIDE), GREY)
        _point(first, chance.randrange(4), colours[right])
        second = Image.new("RGB", (SIDE, SIDE), GREY)
        for corner, colour in enumerate(colours):
            _point(second, corner, colour)
        names = [f"{name}/{i}-1.png", f"{name}/{i}-2.png"]
        for picture, picture_name in zip((first, second), names, strict=True):
            picture.save(folder / picture_name)
        turns = [
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": LETTERS[right]},
        ]
        yield {"id": f"{name}-{i}", "image": names, "conversations": turns}


def _point(picture: Any, corner: int, colour: tuple[int, int, int]) -> None:
    """A square of colour in a corner, a pixel of grey around it."""
    half = SIDE // 2
    x, y = corner % 2 * half, corner // 2 * half
    picture.paste(colour, (x + 1, y + 1, x + half - 1, y + half - 1))
