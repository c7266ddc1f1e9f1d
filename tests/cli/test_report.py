"""`rwkvtune report` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkvtune.cli.main import main
from rwkvtune.cli.report import with_default_share
from tests.training.report_runs import write_run


def test_the_last_line_says_where_the_report_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("out/a"), steps=3)
    write_run(Path("out/b"), steps=2)
    assert main(["report", "out/a"]) == 0
    assert capsys.readouterr().out == "wrote out/a/report.png and out/a/report.html\n"
    assert main(["report", "out/a", "out/b", "--smooth", "--x", "tokens"]) == 0
    assert capsys.readouterr().out == "wrote report.png and report.html\n"
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")
    assert Path("report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "the following arguments are required: RUN"),
        (["out/c"], "out/c does not exist"),
        (["out"], "out is no run folder: it has no metrics.csv"),
        (["out/a", "--x", "epochs"], "argument --x: invalid choice: 'epochs'"),
        (["out/a", "--smooth", "7"], "smooth=7.0 must be a share of the run"),
        (["out/a", "--output", "out/a/metrics.csv/x"], "out/a/metrics.csv is a file"),
        (["out/a", "--oputput", "x"], "unknown flag --oputput (did you mean --output?)"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    argv: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("out/a"), steps=3)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bare_smooth_may_stand_anywhere() -> None:
    for argv, expected in (
        (["--smooth", "a"], ["--smooth", "0.05", "a"]),
        (["a", "--smooth"], ["a", "--smooth", "0.05"]),
        (["a", "--smooth", "--x", "step"], ["a", "--smooth", "0.05", "--x", "step"]),
        (["a", "--smooth", "0.2"], ["a", "--smooth", "0.2"]),
        (["a", "--smooth=0.2"], ["a", "--smooth=0.2"]),
    ):
        assert with_default_share(argv) == expected
