"""Logs in the form that RWKV-LM and this program write, compared with the published losses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import minipile
from rwkvtune.training.log import RunLog

# As printed in the published guide.
PUBLISHED_LINES = """0 4.875856 131.0863 0.00059975 2025-04-24 02:23:42.481256 0
1 4.028621 56.1834 0.00059899 2025-04-24 02:28:16.674463 1
2 3.801625 44.7739 0.00059773 2025-04-24 02:32:51.059568 2
3 3.663070 38.9808 0.00059597 2025-04-24 02:37:25.409892 3
4 3.578974 35.8368 0.00059371 2025-04-24 02:41:59.711315 4
5 3.510906 33.4786 0.00059096 2025-04-24 02:46:33.990839 5
6 3.462345 31.8917 0.00058771 2025-04-24 02:51:08.378331 6
7 3.412196 30.3318 0.00058399 2025-04-24 02:55:42.927474 7
8 3.376724 29.2747 0.00057978 2025-04-24 03:00:17.504665 8
9 3.336911 28.1321 0.00057511 2025-04-24 03:04:52.006063 9
10 3.313411 27.4787 0.00056999 2025-04-24 03:09:27.563336 10
11 3.295895 27.0016 0.00056441 2025-04-24 03:14:01.786079 11
"""
HEADER = "NEW RUN 2025-04-24-02-19-08\n{'n_layer': 12, 'n_embd': 768}\n"


def run(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["minipile", str(path)])
    code = minipile.main()
    told = capsys.readouterr()
    return code, told.out + told.err


def test_the_published_log_agrees_with_itself_also_after_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "train_log.txt"
    first = "".join(PUBLISHED_LINES.splitlines(keepends=True)[:3])
    log.write_text(HEADER + first.replace("3.801625", "3.9") + HEADER + PUBLISHED_LINES)
    code, told = run(tmp_path, capsys, monkeypatch)
    assert code == 0 and "all twelve losses agree" in told


def test_a_loss_that_is_further_away_than_a_hundredth_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "train_log.txt"
    log.write_text(PUBLISHED_LINES.replace("3.510906", "3.520906").replace("3.295895", "3.306"))
    code, told = run(log, capsys, monkeypatch)
    assert code == 1
    (marked,) = [line for line in told.splitlines() if "more than" in line]
    assert marked.split()[:3] == ["11", "3.295895", "3.306000"]


def test_a_run_that_has_not_come_so_far_is_told_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "train_log.txt"
    log.write_text("".join(PUBLISHED_LINES.splitlines(keepends=True)[:10]))
    assert run(log, capsys, monkeypatch)[0] == 1
    log.write_text(HEADER)
    code, told = run(log, capsys, monkeypatch)
    assert code == 2 and told.startswith("error: ") and "no line of a mini-epoch" in told
    code, told = run(tmp_path / "other.txt", capsys, monkeypatch)
    assert code == 2 and told.startswith("error: ")


def test_our_own_log_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, total_steps=12)
    log.start({"n_layer": 12}, "65536 ctx512 L12 D768", step=0, epoch=0)
    for epoch, loss in enumerate(minipile.PUBLISHED):
        log.epoch(epoch, loss - 0.004, 6e-4, epoch)
    log.close()
    assert run(tmp_path, capsys, monkeypatch)[0] == 0
