"""Saving while training goes on: the same files, and no error that is lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from rwkvtune.errors import UserError
from rwkvtune.training.saving import Writer
from tests.training.runs import Blow, flags, outcome, run

SETTINGS = {
    "n_layer": 1, "n_embd": 64, "ctx_len": 32, "threads": 1, "precision": "fp32", "micro_bsz": 2,
    "epoch_steps": 5, "epoch_count": 2, "save_every": 2, "log_every": 1,
}  # fmt: skip


def test_a_run_that_saves_in_the_background_and_is_killed_ends_with_the_same_files(
    text: Path, tmp_path: Path
) -> None:
    args = ["train", *flags(SETTINGS | {"data_file": text})]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run([*args, "--proj_dir", str(whole)], tmp_path / "out").code == 0
    args += ["--proj_dir", str(folder), "--async_save", "true"]
    for number in (3, 9):
        ended = run(args, tmp_path / "out", Blow(number, "step-"))
        assert ended.code == -9, ended.output
    ended = run(args, tmp_path / "out")
    assert ended.code == 0 and "while training went on: waited" in ended.output
    assert outcome(folder) == outcome(whole)


def test_what_is_written_is_what_the_tensors_were_when_they_were_taken() -> None:
    written: list[list[float]] = []
    may_write = threading.Event()
    weight = torch.ones(3)
    with Writer(in_background=True) as writer:
        copies = writer.take(1, {"w": weight}, write=True)
        assert writer.take(1, {"w": weight}, write=True)["w"] is copies["w"], "copied once a step"

        def write() -> None:
            may_write.wait()
            written.append(copies["w"].tolist())

        writer.run(write)
        weight.zero_()
        assert written == []
        may_write.set()
    assert written == [[1.0, 1.0, 1.0]]


def test_an_error_of_the_thread_is_raised_by_the_next_save_or_the_end() -> None:
    def fail() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"), Writer(in_background=True) as writer:
        writer.take(1, {}, write=True)
        writer.run(fail)
        writer.take(2, {}, write=True)
    with pytest.raises(UserError, match="the disk is full"), Writer(in_background=True) as writer:
        writer.run(fail)
