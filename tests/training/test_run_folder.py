"""What a run writes into its folder and when, and what it finds there."""

from __future__ import annotations

import math
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from rwkvtune.checkpoint import load_weights
from tests.training.runs import (
    Blow,
    Ended,
    digest,
    epoch_lines,
    flags,
    is_paused,
    losses,
    metrics,
    outcome,
    run,
    start,
)

SETTINGS = {
    "n_layer": 1, "n_embd": 64, "ctx_len": 32, "threads": 1, "precision": "fp32",
    "micro_bsz": 4, "epoch_steps": 4, "epoch_count": 3, "log_every": 1, "warmup_steps": 3,
}  # fmt: skip


def train(text: Path, folder: Path, **changes: object) -> Ended:
    args = ["train", *flags(SETTINGS | {"data_file": text, "proj_dir": folder} | changes)]
    return run(args, folder.parent / "out")


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def everything(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, digest(p))
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended = train(text, folder)
    assert ended.code == 0, ended.output
    return folder


def test_the_files_are_the_published_ones_and_weights_are_fp32(finished: Path) -> None:
    states = {"resume/step-00000008", "resume/step-00000012"}
    parts = {f"{state}/{name}" for state in states for name in ("state.safetensors", "state.json")}
    weights = {"rwkv-init.pth", "rwkv-0.pth", "rwkv-1.pth", "rwkv-2.pth", "rwkv-final.pth"}
    others = {"config.yaml", "metrics.csv", "train_log.txt", "loss_curve.png", "tokenizer.json"}
    others.add("layers.csv")
    assert names(finished) == states | parts | weights | others | {"resume", ".lock"}
    for name in weights:
        assert {w.dtype for w in load_weights(finished / name).values()} == {torch.float32}
    assert digest(finished / "rwkv-2.pth") == digest(finished / "rwkv-final.pth")
    assert digest(finished / "rwkv-1.pth") != digest(finished / "rwkv-final.pth")


def test_a_finished_run_says_so_and_touches_nothing(finished: Path, text: Path) -> None:
    before = everything(finished)
    ended = train(text, finished)
    assert ended.code == 0 and "this run is finished, at step 12 (12 asked for)" in ended.output
    assert everything(finished) == before


def test_a_run_killed_before_its_picture_gets_it_when_started_again(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert train(text, folder).code == 0
    (folder / "loss_curve.png").unlink()
    assert train(text, folder).code == 0
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_numbered_weights_come_every_epoch_save_epochs_from_the_first_and_at_the_end(
    text: Path, tmp_path: Path
) -> None:
    for epoch_save, expected in ((0, {4}), (2, {0, 2, 4}), (3, {0, 3, 4})):
        folder = tmp_path / f"run-{epoch_save}"
        more = {"epoch_steps": 2, "epoch_count": 5, "epoch_save": epoch_save}
        assert train(text, folder, **more).code == 0
        written = {p.name for p in folder.glob("rwkv-*.pth")}
        numbered = {f"rwkv-{n}.pth" for n in expected}
        assert written == numbered | {"rwkv-init.pth", "rwkv-final.pth"}, epoch_save


def test_a_run_that_ends_by_tokens_writes_final_weights_without_a_number(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = train(
        text, folder, epoch_steps=4, epoch_count=0, exit_tokens=6 * 128 - 1, save_dtype="bf16"
    )
    assert ended.code == 0 and len(metrics(folder)) == 6
    assert {p.name for p in folder.glob("rwkv-*.pth")} == {
        "rwkv-init.pth", "rwkv-0.pth", "rwkv-final.pth",
    }  # fmt: skip
    for path in folder.glob("rwkv-*.pth"):
        assert {w.dtype for w in load_weights(path).values()} == {torch.bfloat16}, path


def test_keep_last_counts_resume_states_and_never_weights(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(text, folder, save_every=1, keep_last=3, epoch_steps=2, epoch_count=4).code == 0
    assert sorted(p.name for p in folder.glob("resume/*")) == [
        "step-00000006", "step-00000007", "step-00000008",
    ]  # fmt: skip
    assert {f"rwkv-{n}.pth" for n in range(4)} <= names(folder)


def test_layers_are_measured_before_clipping_and_only_when_asked_for(
    text: Path, tmp_path: Path
) -> None:
    first_rows, length = [], {"epoch_steps": 3, "epoch_count": 1, "log_every": 2}
    for clip in (0, 1e-3):
        folder = tmp_path / f"clip-{clip}"
        assert train(text, folder, grad_clip=clip, **length).code == 0
        lines = (folder / "layers.csv").read_text().splitlines()
        assert [line.split(",")[:2] for line in lines[1:]] == [["2", "0"], ["3", "0"]]
        assert float(metrics(folder)[0]["grad_norm"]) > 1
        first_rows.append(lines[1])
    # The first step has moved every weight by its learning rate, whatever the size of its gradient.
    unclipped, clipped = (float(row.split(",")[3]) for row in first_rows)
    assert clipped == pytest.approx(unclipped, rel=0.1)

    folder = tmp_path / "without"
    assert train(text, folder, log_layers="false", **length).code == 0
    assert not (folder / "layers.csv").exists() and len(metrics(folder)) == 2


def test_what_may_change_at_resume_changes_and_goes_on(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    folder, whole = tmp_path / "moved", tmp_path / "whole"
    shutil.copytree(finished, folder)
    changes = {
        "epoch_count": 4, "epoch_save": 0, "save_every": 2, "keep_last": 5, "log_every": 2,
        "val_every": 3, "sample_every": 2, "micro_bsz": 2, "accumulate_grad_batches": 2,
        "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "ddp",
        "threads": 2,
        "tensorboard": "true", "resume": "auto", "log_layers": "false",
    }  # fmt: skip
    ended = train(text, folder, **changes)
    assert ended.code == 0, ended.output
    assert [int(row["step"]) for row in metrics(folder)] == [*range(1, 13), 14, 16]
    assert (folder / "rwkv-3.pth").exists() and list((folder / "tensorboard").iterdir())
    assert train(text, whole, epoch_count=4, lr_schedule="cosine").code == 0
    assert epoch_lines(folder)[:3] == epoch_lines(finished)
    # From there on only the schedule of the longer run counts, as if it had always been so long.
    lr = {row["step"]: row["lr"] for row in metrics(whole)}
    assert all(row["lr"] == lr[row["step"]] for row in metrics(folder)[12:])


def test_any_other_difference_is_refused_all_of_them_in_one_line(
    finished: Path, text: Path
) -> None:
    before = everything(finished)
    other = f"{text}_val"
    more = {
        "lr_init": 1e-3, "n_embd": 128, "order": "shuffled", "random_seed": 7, "micro_bsz": 8,
        "data_file": other, "precision": "bf16", "beta2": 0.95, "epoch_steps": 5,
    }  # fmt: skip
    ended = train(text, finished, **more)
    assert ended.code == 2 and ended.output.count("\n") == 1
    assert ended.output.startswith(f"error: {finished} holds a run with other settings: ")
    for difference in (
        "lr_init: 0.0006 -> 0.001", "n_embd: flag 128, the run 64", "random_seed: 42 -> 7",
        "order: 'published' -> 'shuffled'", "global_bsz: 4 -> 8", "beta2: 0.99 -> 0.95",
        f"data_file: '{text}' -> '{other}'", "precision: 'fp32' -> 'bf16'", "epoch_steps: 4 -> 5",
    ):  # fmt: skip
        assert difference in ended.output
    assert everything(finished) == before


def test_data_may_be_moved_but_other_data_under_the_same_name_are_refused(
    text: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "data"
    shutil.copytree(text.parent, moved)
    folder = tmp_path / "run"
    assert train(text, folder, epoch_count=1, val_data_file=f"{text}_val").code == 0
    again = train(moved / text.name, folder, val_data_file=f"{moved / text.name}_val")
    assert again.code == 0 and "resumed from" in again.output
    without = train(moved / text.name, folder, epoch_count=9)
    assert without.code == 2 and "val_data_file: " in without.output
    with open(f"{moved / text.name}.bin", "r+b") as file:
        file.write(b"\x05\x00\x06\x00")
    ended = train(moved / text.name, folder)
    assert ended.code == 2 and "data: '9003 tokens, crc32" in ended.output


def test_resume_never_refuses_a_used_folder(finished: Path, text: Path, tmp_path: Path) -> None:
    before = everything(finished)
    ended = train(text, finished, resume="never")
    assert ended.code == 2 and "already holds a run and resume=never" in ended.output
    assert everything(finished) == before
    assert train(text, tmp_path / "new", resume="never", epoch_count=1).code == 0


def test_going_on_does_not_warm_up_again(finished: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(text, folder, epoch_count=3, exit_tokens=12 * 128).code == 0
    shutil.rmtree(folder / "resume" / "step-00000012")
    assert train(text, folder, epoch_count=3, exit_tokens=12 * 128).code == 0
    assert outcome(folder) == outcome(finished)
    assert float(metrics(folder)[8]["lr"]) > 1e-4


def test_bare_numbered_weights_restart_as_upstream_does(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    """Step = epochs behind x epoch_steps, samples go on from there, the optimizer is new, and the
    warmup counts from the restart (RWKV-LM, train_temp)."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished / "rwkv-0.pth", folder)
    more = {"epoch_count": 5, "epoch_save": 3, "warmup_steps": -1}
    ended = train(text, folder, **more)
    assert ended.code == 0, ended.output
    assert "goes on from rwkv-0.pth after mini-epoch 0, with a new optimizer" in ended.output
    rows = metrics(folder)
    assert [int(row["step"]) for row in rows] == list(range(5, 21))
    assert [int(row["tokens"]) for row in rows] == [128 * n for n in range(5, 21)]
    # The first loss is that of rwkv-0.pth on the fifth batch: the same as in the run it is from.
    assert losses(folder)[0] == losses(finished)[4]
    # -1 means ten steps for a restart, from 1 % on, and the cosine starts after ten steps as well.
    for step, row in enumerate(rows, start=4):
        warmup = min(1.0, 0.01 + 0.99 * (step - 4) / 10)
        q = max(0.0, (step - 10) / (20 - 10))
        cosine = (6e-4 + 6e-5) / 2 + (6e-4 - 6e-5) / 2 * math.cos(math.pi * q)
        assert float(row["lr"]) == pytest.approx(warmup * cosine, rel=1e-9)
    written = {p.name for p in folder.glob("rwkv-*.pth")}
    assert written == {"rwkv-0.pth", "rwkv-1.pth", "rwkv-4.pth", "rwkv-final.pth"}
    # Published: the last column counts the epochs since the restart.
    assert [line.split()[0::4] for line in epoch_lines(folder)] == [
        ["1", "0"], ["2", "1"], ["3", "2"], ["4", "3"],
    ]  # fmt: skip

    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    shutil.copy(finished / "rwkv-0.pth", interrupted)
    assert train(text, interrupted, **more, save_every=3).code == 0
    for state in (interrupted / "resume").iterdir():
        if state.name > "step-00000018":
            shutil.rmtree(state)
    assert train(text, interrupted, **more, save_every=3).code == 0
    assert metrics(interrupted) == rows


def test_a_damaged_newest_state_makes_way_for_the_one_before(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    state = folder / "resume" / "step-00000012" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-100] ^= 1
    state.write_bytes(content)
    ended = train(text, folder)
    assert ended.code == 0, ended.output
    assert "step-00000012 is damaged" in ended.output and "from 8" in ended.output
    assert outcome(folder) == outcome(finished)


def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    args = ["train", *flags(SETTINGS | {"data_file": text, "proj_dir": folder, "epoch_count": 50})]
    first = start(args, tmp_path / "first")
    first.wait_until((folder / "rwkv-0.pth").exists)
    first.send(signal.SIGSTOP)  # or it could end before the second has started
    second = train(text, folder, epoch_count=50)
    assert second.code == 2, second.output
    assert f"pid {first.process.pid}" in second.output and second.output.count("\n") == 1
    first.send(signal.SIGTERM)
    first.send(signal.SIGCONT)
    assert first.wait().code == 143
    assert train(text, folder, epoch_count=4).code == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_run_that_was_overtaken_by_another_in_its_folder_begins_nothing(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    args = ["train", *flags(SETTINGS | {"data_file": text, "proj_dir": folder})]
    slow = start(args, tmp_path / "slow", Blow(1, "/.lock", signal.SIGSTOP))
    slow.wait_until(partial(is_paused, slow))
    assert train(text, folder).code == 0
    before = everything(folder)
    slow.send(signal.SIGCONT)
    ended = slow.wait()
    assert ended.code == 2 and "another run has just been using" in ended.output, ended
    del before[".lock"]
    assert {k: v for k, v in everything(folder).items() if k != ".lock"} == before


def test_a_file_in_the_place_of_the_folder_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    ended = train(text, tmp_path / "taken")
    assert ended.code == 2 and "is a file" in ended.output and ended.output.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("folder", ["taken/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_refused(folder: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    args = ["train", *flags(SETTINGS | {"data_file": text, "proj_dir": tmp_path / folder})]
    ended = run(args, tmp_path / "out")
    assert ended.code == 2 and ended.output.count("\n") == 1, ended.output
    assert ended.output.startswith("error: cannot write ")


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_fills_up_ends_the_run_with_a_line_and_going_on_is_exact(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    args = ["train", *flags(SETTINGS | {"data_file": text, "proj_dir": folder})]
    running = start(args, tmp_path / "out", Blow(1, "rwkv-0.pth", signal.SIGSTOP))
    running.wait_until(partial(is_paused, running))
    assert running.process.pid is not None
    limit = (100_000, resource.RLIM_INFINITY)  # less than any file of weights, more than the logs
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, limit)
    running.send(signal.SIGCONT)
    ended = running.wait()
    assert ended.code == 2 and "Traceback" not in ended.output
    error = ended.output.splitlines()[-1]
    assert error.startswith("error: cannot write ") and "run the same command again" in error
    assert train(text, folder).code == 0
    assert outcome(folder) == outcome(finished)
    assert not list(folder.rglob(".tmp-*"))
