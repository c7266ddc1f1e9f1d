"""Witness: a clock of whole seconds, and counts by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rwkvtune.cli.main import guarded, main
from rwkvtune.training.throughput import Throughput
from tests.token_files import write_token_files


def test_rates_are_counts_over_seconds_without_the_first_step() -> None:
    ticks = iter([0.0, 100.0, 102.0, 104.0, 108.0, 109.0])
    lines: list[str] = []
    meter = Throughput(every=2, device_type="cpu", write=lines.append, clock=lambda: next(ticks))
    measured = []
    for samples in (9, 4, 4, 2, 1):  # the last batches are smaller
        meter.add(samples=samples, tokens=10 * samples, visual_tokens=samples)
        measured.append(meter.step())
    assert [m is not None for m in measured] == [False, False, True, False, True]
    first, last = measured[2], measured[4]
    assert first and last
    assert (first["samples_per_s"], first["tokens_per_s"], first["step_ms"]) == (2, 20, 2000)
    assert (last["samples_per_s"], last["visual_tokens_per_s"]) == (3 / 5, 3 / 5)
    assert "2.00 samples/s  20 tokens/s  2 visual tokens/s  2000.0 ms/step" in lines[0]


def test_the_time_of_a_step_may_be_given_and_counts_of_all_processes_summed() -> None:
    lines: list[str] = []
    meter = Throughput(every=1, device_type="cpu", write=lines.append)
    meter.sum_with(lambda counts: [2 * count for count in counts])
    meter.step(50.0)
    meter.add(samples=3, tokens=6)
    measured = meter.step(0.5)
    assert measured and measured["samples_per_s"] == 12 and measured["step_ms"] == 500
    assert "visual" not in lines[0]


def test_zero_steps_switch_it_off() -> None:
    meter = Throughput(every=0, device_type="cpu", write=lambda line: pytest.fail(line))
    for _ in range(3):
        meter.add(samples=1, tokens=1)
        assert meter.step() is None


@pytest.mark.parametrize("door", ["train", "published"])
def test_a_run_prints_its_throughput(
    door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_token_files(["to be or not to be " * 20], tmp_path / "text", "bytes")
    argv = f"--data_file {tmp_path / 'text'} --proj_dir {tmp_path / 'out'} --n_layer 1 --n_embd 64"
    argv += " --vocab_size 256 --ctx_len 16 --micro_bsz 2 --epoch_steps 5 --epoch_count 1"
    argv += " --throughput_log_steps 2"
    if door == "train":
        code = main(["train", *argv.split(), "--order", "shuffled"])
    else:
        code = guarded("published_flags", [*argv.split(), "--data_type", "binidx"])
    out = capsys.readouterr().out
    assert code == 0, out
    found = re.findall(
        r"throughput over 2 steps: (\S+) samples/s  (\d+) tokens/s  \S+ ms/step", out
    )
    assert len(found) == 2
    for samples, tokens in found:
        assert int(tokens) == pytest.approx(16 * float(samples), rel=0.05)
