"""SIGTERM and Ctrl-C: what is saved, which exit code, and that going on is exact."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import Blow, flags, metrics, outcome, run, start

SETTINGS = {
    "n_layer": 1, "n_embd": 64, "ctx_len": 32, "threads": 1, "precision": "fp32",
    "micro_bsz": 4, "exit_tokens": 40 * 128, "log_every": 1, "epoch_steps": 15,
}  # fmt: skip
ROOT = Path(__file__).parents[2]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def args(text: Path, folder: Path, **changes: object) -> list[str]:
    return ["train", *flags(SETTINGS | {"data_file": text, "proj_dir": folder} | changes)]


@pytest.mark.parametrize("number", CODES)
def test_a_stopped_run_has_saved_its_step_and_goes_on_exactly(
    number: signal.Signals, text: Path, tmp_path: Path
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    rows = tmp_path / "rows"
    ended = run(args(text, folder), tmp_path / "out", Blow(5, f"{rows}-", number), rows)
    assert ended.code == CODES[number], ended.output
    steps = len(metrics(folder))
    assert steps == 5
    assert f"stopped after step {steps}; the same command goes on from there" in ended.output
    assert "Traceback" not in ended.output
    assert (folder / "resume" / f"step-{steps:08d}" / "state.json").exists()
    assert (folder / "loss_curve.png").exists() and not (folder / "rwkv-final.pth").exists()

    assert run(args(text, folder), tmp_path / "out").code == 0
    assert run(args(text, whole), tmp_path / "out").code == 0
    assert outcome(folder) == outcome(whole)


def test_a_stop_while_validating_or_saving_waits_for_the_next_step(
    text: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    more = {"val_data_file": f"{text}_val", "val_every": 4, "save_every": 3}
    for i, blow in enumerate((Blow(1, "step-00000003", signal.SIGTERM),
                              Blow(2, "rwkv-0.pth", signal.SIGTERM))):  # fmt: skip
        ended = run(args(text, folder, **more), tmp_path / "out", blow)
        assert ended.code == 143, ended.output
        assert f"stopped after step {(4, 16)[i]};" in ended.output
    assert run(args(text, folder, **more), tmp_path / "out").code == 0
    assert run(args(text, whole, **more), tmp_path / "out").code == 0
    assert outcome(folder) == outcome(whole)


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_stops_at_once(number: signal.Signals, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # A step of many micro-batches takes long enough to be caught in the middle.
    running = start(args(text, folder, accumulate_grad_batches=2000), tmp_path / "out")
    running.wait_until((folder / "rwkv-init.pth").exists)
    running.wait_until((folder / "rwkv-init.pth").exists)
    running.send(number)
    with pytest.raises(AssertionError, match="it never happened"):
        running.wait_until((folder / "resume" / "step-00000001").exists, timeout=0.3)
    running.send(number)
    ended = running.wait()
    assert ended.code == CODES[number], ended.output
    assert "Traceback" not in ended.output
    assert [p.name for p in folder.glob("resume/*")] == ["step-00000000"]


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("moment", ["text.idx", "config.yaml"])
def test_signals_before_the_loop_end_the_process_without_a_traceback(
    number: signal.Signals, moment: str, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = run(args(text, folder), tmp_path / "out", Blow(1, moment, number))
    assert ended.code == CODES[number], ended.output
    assert "Traceback" not in ended.output
    assert folder.exists() == (moment != "text.idx")


def test_a_reader_of_the_output_that_leaves_stops_the_run_with_its_state_saved(
    text: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rwkvtune", *args(text, tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    ) as running:
        assert running.stdout and running.stderr
        while not running.stdout.readline().startswith("step  3/40"):
            pass
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 143
    steps = len(metrics(tmp_path / "run"))
    assert 3 <= steps < 40
    assert (tmp_path / "run" / "resume" / f"step-{steps:08d}" / "state.json").exists()
