"""The vision demo's data and judgement; the demo itself takes minutes."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rwkvtune.data.tokenizers import load_tokenizer
from rwkvtune.demo.pictures import (
    COLOURS,
    DIGITS,
    PLACES,
    QUESTIONS,
    SHAPES,
    Painter,
    Scene,
    scenes,
    write_data,
    write_questions,
)
from rwkvtune.demo.vision import accuracy, contact_sheet, majority
from rwkvtune.evaluation.vision import Answer, Question, Scores, read_questions


def test_what_is_held_out_is_never_trained_but_all_its_parts_are() -> None:
    trained, held_out = set(scenes(held_out=False)), set(scenes(held_out=True))
    assert not trained & held_out
    assert len(trained | held_out) == 6 * 15 * 5 and len(held_out) == 90
    for part, values in (("colour", COLOURS), ("thing", (*SHAPES, *DIGITS)), ("place", PLACES)):
        for some in (trained, held_out):
            assert {getattr(scene, part) for scene in some} == set(values)
    pairs = {(scene.colour, scene.thing) for scene in held_out}
    assert pairs <= {(scene.colour, scene.thing) for scene in trained}, "at another place"


def test_training_data_hold_no_scene_and_no_handwriting_of_the_test(tmp_path: Path) -> None:
    write_data(tmp_path / "train", pictures=60, seed=1)
    write_questions(tmp_path / "test", pictures=30, seed=2)
    records = json.loads((tmp_path / "train" / "chat.json").read_text())
    captions = [r["conversations"][1]["value"] for r in records[::2]]
    assert len(captions) == 60 and set(captions) <= {s.caption for s in scenes(held_out=False)}
    texts = (tmp_path / "train" / "text.jsonl").read_text()
    assert not any(scene.caption + "\\" in texts for scene in scenes(held_out=True))
    questions = read_questions(tmp_path / "test" / "questions.jsonl")
    assert len(questions) == 90 and {q.text for q in questions} == set(QUESTIONS.values())
    digits = load_digits().images
    first = len(digits) * 4 // 5
    assert np.array_equal(Painter(held_out=False, seed=0)._images, digits[:first])
    assert np.array_equal(Painter(held_out=True, seed=0)._images, digits[first:])


@pytest.mark.parametrize("thing", [*SHAPES, "7"])
def test_a_scene_has_its_colour_at_its_place(thing: str) -> None:
    for place, (x, y) in PLACES.items():
        pixels = Painter(held_out=False, seed=3).paint(Scene("red", thing, place)).astype(int)
        reddish = (pixels[:, :, 0] > 130) & (pixels[:, :, 1] < 110)
        rows, columns = reddish.nonzero()
        assert 25 < len(rows) < 500
        assert abs(columns.mean() - x) < 5 and abs(rows.mean() - y) < 5


def test_the_vocabulary_takes_words_with_their_space_and_reads_any_text(tmp_path: Path) -> None:
    write_data(tmp_path, pictures=60, seed=1)
    tokenizer = load_tokenizer(tmp_path / "vocabulary.txt")
    text = "\x16User: Which colour?\x17\x16Assistant: red\x17"
    ids = tokenizer.encode(text)
    words = [tokenizer.decode([id]) for id in ids]
    assert words == ["\x16", "User", ":", " Which", " colour", "?", "\x17", "\x16", "Assistant",
                     ":", " red", "\x17"]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("Zebra é")) == "Zebra é"
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        picture = Image.open(BytesIO(archive.read("00000.png")))
        assert picture.size == (48, 48) and len(archive.namelist()) == 60


def test_baseline_and_score_are_counted_by_hand(tmp_path: Path) -> None:
    def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
        return [
            {"from": who, "value": text}
            for question, answer in pairs
            for who, text in (("human", question), ("gpt", answer))
        ]

    records = [
        {"conversations": turns(("<image>\nA?", "x"), ("B?", "u"))},
        {"conversations": turns(("<image>\nA?", "y"), ("B?", "u"))},
        {"conversations": turns(("<image>\nA?", "x"))},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    asked = [("A?", "x", True), ("A?", "y", True), ("B?", "u", False), ("B?", "w", False)]
    answers = [
        Answer(Question(i, text, (right,), pictures=("a.png",)), "said", is_right)
        for i, (text, right, is_right) in enumerate(asked)
    ]
    assert majority(tmp_path / "chat.json", Scores(answers)) == 50.0
    assert accuracy(Scores(answers)) == 50.0
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    contact_sheet(Scores(answers), tmp_path, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 500
