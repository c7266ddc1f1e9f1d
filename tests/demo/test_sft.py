"""The fine-tuning demo's data, and its course in a few steps; running it shows that it learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rwkvtune.cli.main import main
from rwkvtune.demo import sft, tasks

EXPECTED = {
    "copy": ("copy abc", "abc"),
    "capitals": ("write abc in capitals", "ABC"),
    "first letter": ("first letter of abc", "a"),
    "last letter": ("last letter of abc", "c"),
    "reverse": ("reverse abc", "cba"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(path: Path) -> list[set[str]]:
    """The words of each sample's turns."""
    samples = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [{word for turn in turns for word in turn["content"].split()} for turns in samples]


def test_held_out_strings_occur_in_no_training_sample(tmp_path: Path) -> None:
    training, held_out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    tasks.write_tasks(training, held_out, count=2000)
    asked = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert len(asked) == 300 and {record["task"] for record in asked} == set(EXPECTED)
    strings = {r["messages"][1]["content"] for r in asked if r["task"] == "copy"}
    assert len(strings) == 60
    assert not any(strings & found for found in words(training))
    again = tmp_path / "c.jsonl"
    tasks.write_tasks(again, tmp_path / "d.jsonl", count=2000)
    assert again.read_bytes() == training.read_bytes()


@pytest.mark.parametrize("task", EXPECTED)
def test_every_task_asks_for_what_its_answer_is(task: str) -> None:
    turns = json.loads(tasks.line_of(task, "abc"))["messages"]
    assert tuple(turn["content"] for turn in turns) == EXPECTED[task]


def test_a_demo_that_has_learned_nothing_says_so_and_shows_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = sft.RECIPE.read_text().replace("exit_tokens: 409600", "exit_tokens: 2048")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small.replace("epoch_steps: 900", "epoch_steps: 2").replace("128", "64"))
    monkeypatch.setattr(sft, "RECIPE", recipe)
    monkeypatch.setattr(sft, "CONVERSATIONS", 100)
    monkeypatch.setattr(tasks, "HELD_OUT_PER_TASK", 4)
    assert main(["demo", "sft", "--proj_dir", str(tmp_path / "run")]) == 1
    out = capfd.readouterr().out
    assert "held-out exact match 0.000 before, 0.000 after" in out
    assert "that is less than 0.5" in out
    assert main(["demo", "sft", "--proj_dir", str(tmp_path / "run")]) == 1
    again = capfd.readouterr().out
    assert again.count("this run is finished") == 2 and out.splitlines()[-2] in again
