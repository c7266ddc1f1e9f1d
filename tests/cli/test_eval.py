"""`rwkvtune eval` as a user runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import rwkvtune
from rwkvtune.cli.main import main
from rwkvtune.data.tokenizers import find_tokenizer

TEXT = "First Citizen:\nWe are hungry.\n\nAll:\nSpeak, speak.\n"


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "play.txt").write_text(TEXT)
    (tmp_path / "chinese.txt").write_text("北京", encoding="utf-8")
    lines = [{"text": "a king"}, {"text": "a queen and a lord"}, {"text": "no"}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return run_folder


def test_text_files_are_measured_as_their_definition_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(folder), "--files", "play.txt", "lines.jsonl", "--json", "out.json"]
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == [
        *["file", "documents", "tokens", "bytes", "loss", "perplexity", "bits", "per", "byte"],
        "over",
    ]
    found = json.loads(Path("out.json").read_text())["texts"]
    assert found["lines.jsonl"]["documents"] == 3 and found["play.txt"]["bytes"] == len(TEXT)

    tokenizer = find_tokenizer(folder)
    assert tokenizer is not None
    ids = torch.tensor([[0, *tokenizer.encode(TEXT)]])
    with torch.no_grad():
        logits, _ = rwkvtune.load(folder / "rwkv-final.pth")(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits[0].double(), ids[0, 1:])
    assert found["play.txt"]["loss"]["value"] == pytest.approx(float(loss), rel=1e-5)
    assert found["play.txt"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    low, high = found["lines.jsonl"]["loss"]["interval_95"]
    assert low < found["lines.jsonl"]["loss"]["value"] < high
    assert f"{float(loss):.4f}" in table[1]

    assert main([*words[:-2], "--limit", "2", "--batch_size", "1", "--window", "3"]) == 0
    limited = capsys.readouterr().out.splitlines()
    assert limited[1].split()[:5] == table[1].split()[:5]  # the same, read otherwise
    assert limited[2].split()[:2] == ["lines.jsonl", "2"]


def test_a_task_of_ones_own_prints_its_standard_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval comes with the dev extra")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("cache").absolute()))
    tasks = Path("tasks")
    tasks.mkdir()
    (tasks / "who.yaml").write_text(
        "task: who\ndataset_path: json\ndataset_kwargs: {data_files: {test: lines.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: 'Who?'\n"
        "doc_to_target: ' {{text}}'\nmetric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )
    words = ["eval", str(folder), "--tasks", "who", "--include_path", "tasks", "--json", "o.json"]
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "shots", "samples", "metric", "value", "stderr", "95", "%",
                                "interval"]  # fmt: skip
    assert table[1].split()[:5] == ["who", "0", "3", "acc", "0"]
    (metric,) = json.loads(Path("o.json").read_text())["tasks"]
    # Wilson's interval of none of n: 0 to z^2 / (n + z^2).
    assert metric["stderr"] == 0
    assert metric["interval_95"] == pytest.approx([0, 1.96**2 / (3 + 1.96**2)], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "there is nothing to measure: give --files or --tasks"),
        (["--files", "none.txt"], "no such file or folder: 'none.txt'"),
        (["--files", "play.txt", "--batch_size", "0"], "--batch_size is 0: give 1 or more"),
        (["--files", "play.txt", "--num_fewshot", "2"], "are for --tasks, which is not given"),
        (["--files", "lines.jsonl", "--text_key", "body"], "body"),
        (["--files", "chinese.txt"], "chinese.txt: character '北' at position 0"),
        (["--tasks", "x", "--include_path", "nowhere"], "--include_path nowhere is no folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert main(["eval", str(folder), *words]) == 2
    told = ("weights: ", "kernel ")
    error = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(told)]
    assert len(error) == 1 and error[0].startswith("error: ") and expected in error[0]
