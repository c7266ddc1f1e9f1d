"""Two processes on the CPU: the numbers of one, one message for an error, nothing that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from tests.training.runs import (
    Blow,
    Running,
    flags,
    losses,
    metrics,
    rank_environment,
    run,
    start,
    start_ranks,
    trained_rows,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "n_layer": 2, "n_embd": 64, "ctx_len": 32, "threads": 1, "precision": "fp32",
    "accelerator": "cpu", "micro_bsz": 1, "accumulate_grad_batches": 2, "epoch_steps": 10,
    "epoch_count": 2, "log_every": 1, "val_every": 10, "reset_at_documents": "true",
    "engine": "torch",
}  # fmt: skip
ALONE = {"accumulate_grad_batches": 4}
TOLERANCE = 1e-5
"""Sums in another order; 9.5e-7 was measured over 20 steps at this size."""


def args(text: Path, folder: Path, **changes: object) -> list[str]:
    data = {"data_file": text, "val_data_file": f"{text}_val", "proj_dir": folder}
    return ["train", *flags(SETTINGS | data | changes)]


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    ended = run(args(text, folder, **ALONE), folder.parent / "out", rows=folder.parent / "rows")
    assert ended.code == 0, ended.output
    return folder


def assert_same_numbers(folder: Path, expected: Path) -> None:
    assert losses(folder) == pytest.approx(losses(expected), abs=TOLERANCE)
    both = folder, expected
    for row, other in zip(metrics(folder), metrics(expected), strict=True):
        assert (row["step"], row["tokens"], row["lr"]) == (
            other["step"], other["tokens"], other["lr"],
        )  # fmt: skip
        assert float(row["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-4)
        for name in ("val_loss", "val_bits_per_byte"):
            assert bool(row[name]) == bool(other[name])
            if row[name]:
                assert float(row[name]) == pytest.approx(float(other[name]), abs=TOLERANCE)
    ours, theirs = (np.loadtxt(f / "layers.csv", delimiter=",", skiprows=1) for f in both)
    assert np.array_equal(ours[:, :2], theirs[:, :2]) and len(ours) == 40
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_ddp_launched_by_the_command_itself_equals_one_process(
    alone: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "rwkvtune", *args(text, folder, devices=2, strategy="ddp")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "nothing but the run's own lines"
    assert done.stdout.count("step 20/20  epoch") == 1, "only rank zero speaks"
    assert done.stdout.count("kernel ") == 1
    assert_same_numbers(folder, alone)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 has FSDP2 for GPUs only"
)
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_1", "deepspeed_stage_2_offload"])
def test_under_torchrun_a_stop_asked_of_one_rank_stops_all_and_one_process_goes_on(
    strategy: str, alone: Path, text: Path, tmp_path: Path
) -> None:
    folder, rows = tmp_path / "run", tmp_path / "rows"
    in_step_4 = {1: Blow(7, f"{rows}-", signal.SIGTERM)}
    ranks = start_ranks(
        args(text, folder, strategy=strategy), tmp_path, 2, blows=in_step_4, rows=rows
    )
    ended = [rank.wait() for rank in ranks]
    assert [e.code for e in ended] == [143, 0], ended
    assert len(metrics(folder)) == 4
    ended = [
        rank.wait()
        for rank in start_ranks(
            args(text, folder, strategy=strategy, epoch_count=1), tmp_path, 2, rows=rows
        )
    ]
    assert [e.code for e in ended] == [0, 0], ended
    done = run(args(text, folder, **ALONE), tmp_path / "out", rows=rows)
    assert done.code == 0, done.output
    assert_same_numbers(folder, alone)
    assert trained_rows(rows) == trained_rows(alone.parent / "rows"), "none lost, none twice"


def test_a_loss_that_is_not_finite_ends_all_ranks_with_one_message_and_a_good_state(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    bad = {"lr_init": 1e30, "lr_final": 1e30, "warmup_steps": 0, "epoch_save": 0, "save_every": 1}
    ended = [rank.wait() for rank in start_ranks(args(text, folder, **bad), tmp_path, 2)]
    assert all(e.code != 0 for e in ended), ended
    told = "".join(e.output for e in ended)
    assert told.count("error: step ") == 1 and "Traceback" not in told, told
    assert "not moved and nothing was saved" in told
    newest = max(folder.glob("resume/step-*"))
    assert int(newest.name[5:]) == len(metrics(folder))


def test_settings_that_are_refused_are_told_once_before_the_processes_meet(
    text: Path, tmp_path: Path
) -> None:
    for wrong in ({"micro_bsz": 0}, {"data_file": tmp_path / "nothing"}, {"devices": 1}):
        ended = [
            rank.wait() for rank in start_ranks(args(text, tmp_path / "run", **wrong), tmp_path, 2)
        ]
        assert [e.code for e in ended] == [2, 2], ended
        assert "".join(e.output for e in ended).count("error: ") == 1, ended
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_killed_takes_the_others_with_it(text: Path, tmp_path: Path) -> None:
    for victim in (0, 1):
        folder = tmp_path / f"run-{victim}"
        ranks = start_ranks(args(text, folder, epoch_count=400), tmp_path, 2)
        ranks[0].wait_until((folder / "rwkv-0.pth").exists)  # of 400
        ranks[victim].send(signal.SIGKILL)
        assert ranks[1 - victim].wait().code not in (0, None)


def test_a_restart_by_torchrun_does_not_look_for_the_ranks_that_are_gone(
    text: Path, tmp_path: Path
) -> None:
    """torchrun's store outlives its ranks and has their addresses; a rank that comes first would
    read them."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in (0, 1):
        told = {
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }  # fmt: skip
        ranks: list[Running] = []
        for rank in (1, 0):
            keys = agent.num_keys()
            environment = rank_environment(rank, 2, agent.port) | told
            command = args(text, tmp_path / "run", epoch_count=attempt + 1)
            ranks.append(start(command, tmp_path / f"rank-{rank}", environment=environment))
            ranks[0].wait_until(partial(_has_more_keys, agent, keys))
        ended = [rank.wait() for rank in ranks]
        assert [e.code for e in ended] == [0, 0], ended
    assert len(metrics(tmp_path / "run")) == 20


def _has_more_keys(store: TCPStore, before: int) -> bool:
    return store.num_keys() > before


FAILS_ON_ONE_RANK = """
import sys
from rwkvtune.errors import UserError
from rwkvtune.training.config import DeviceOptions
from rwkvtune.training.fabric import launched, make_fabric

fabric = make_fabric(DeviceOptions(accelerator="cpu", devices=2))
with launched(fabric, threads=1, same_for_all=""):
    if fabric.global_rank == int(sys.argv[1]):
        raise UserError("only this one has failed")
    while True:
        fabric.barrier()
"""


def test_an_error_of_one_rank_ends_a_run_that_launched_itself(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ON_ONE_RANK)
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank in ("0", "1")
    ]
    for process in runs:
        told, _ = process.communicate(timeout=600)  # ends when all of its processes have
        assert process.returncode != 0
        assert told == "error: only this one has failed\n"


def test_processes_that_disagree_about_the_run_are_told_so(text: Path, tmp_path: Path) -> None:
    """As on machines whose run folders are not one shared folder."""
    ranks = start_ranks(
        args(text, tmp_path / "run"), tmp_path, 2, last_rank=["--exit_tokens", "1280"]
    )
    ended = [rank.wait() for rank in ranks]
    assert all(e.code != 0 for e in ended), ended
    told = "".join(e.output for e in ended)
    assert told.count("error: the processes of this run disagree") == 1, told
    assert not (tmp_path / "run").exists()
