"""Witness: pictures read back pixel by pixel, and the table of the sweep."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest

from rwkvtune.cli.main import main
from rwkvtune.demo import alternating
from rwkvtune.demo.correspondence import LETTERS, write_task


def corners(path: Path) -> list[tuple[int, ...]]:
    picture = PIL.Image.open(path).convert("RGB")
    places = [(4, 4), (12, 4), (4, 12), (12, 12)]
    return [tuple(picture.getpixel(place)) for place in places]  # type: ignore[arg-type]


def test_the_answer_is_the_corner_with_the_marked_colour(tmp_path: Path) -> None:
    train, test = write_task(tmp_path, train=30, test=10)
    samples = json.loads(train.read_text()) + json.loads(test.read_text())
    chosen = set()
    for sample in samples:
        first, second = (corners(tmp_path / name) for name in sample["image"])
        (marked,) = [colour for colour in first if colour != (128, 128, 128)]
        assert len(set(second)) == 4
        right = LETTERS[second.index(marked)]
        assert sample["conversations"][1]["value"] == right
        chosen.add(right)
    assert chosen == set(LETTERS)


def test_the_demo_compares_the_three_and_shows_the_table_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alternating, "TRAIN", 4)
    monkeypatch.setattr(alternating, "TEST", 4)
    small = {"max_steps": 1, "per_device_train_batch_size": 2}
    monkeypatch.setattr(alternating, "TRAINING", alternating.TRAINING | small)
    assert main(["demo", "alternating", "--proj_dir", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    table = first[first.index("variant  ") :]
    assert [line.split()[0] for line in table.splitlines()[1:4]] == [
        "base", "alternating", "alternating_cross",
    ]  # fmt: skip
    assert main(["demo", "alternating", "--proj_dir", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert table.split("\n\n")[0] in again and "step" not in again[: again.index("variant  ")][:200]
