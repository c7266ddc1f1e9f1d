"""The pictures of runs, decoded again."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rwkvtune.errors import UserError
from rwkvtune.training.report import (
    COLOURS,
    TRAINING,
    VALIDATION,
    _outputs,
    _title,
    draw_loss_curve,
    write_report,
)
from rwkvtune.training.report_data import find_runs
from tests.training.report_runs import SOURCES, write_run

DEEP_LAYER, FIRST_LAYER = "#addc30", "#440154"
"""Of matplotlib's viridis, at 0.88 and 0."""


def pixels(path: Path, colour: str) -> int:
    """How many pixels have this colour, or nearly: the edges of a line are mixed with the page."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    with Image.open(path) as image:
        assert image.format == "PNG"
        difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - wanted)
        return int((difference.max(axis=-1) <= 15).sum())


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_training_and_validation_are_drawn(tmp_path: Path, steps: int) -> None:
    png = tmp_path / "loss.png"
    draw_loss_curve(write_run(tmp_path, steps=steps, validate_every=0) / "metrics.csv", png)
    assert pixels(png, TRAINING) > 25 and pixels(png, VALIDATION) == 0
    draw_loss_curve(write_run(tmp_path, steps=steps, validate_every=1) / "metrics.csv", png)
    assert pixels(png, VALIDATION) > 25


def test_a_run_that_logged_nothing_or_has_no_file_still_gives_a_picture(tmp_path: Path) -> None:
    for metrics in (write_run(tmp_path, steps=0) / "metrics.csv", tmp_path / "none.csv"):
        draw_loss_curve(metrics, tmp_path / "loss.png")
        assert pixels(tmp_path / "loss.png", TRAINING) == 0
    assert [p.name for p in tmp_path.glob(".tmp*")] == []


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    metrics = write_run(tmp_path) / "metrics.csv"
    lines = metrics.read_text().splitlines()
    for i, value in ((3, "nan"), (4, "inf")):
        cells = lines[i].split(",")
        lines[i] = ",".join([*cells[:3], value, *cells[4:]])
    metrics.write_text("\n".join(lines) + "\n")
    draw_loss_curve(metrics, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", TRAINING) > 25


def test_a_file_that_is_no_metrics_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("hello\n")
    with pytest.raises(UserError, match="notes.csv holds no training metrics"):
        draw_loss_curve(tmp_path / "notes.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_the_title_tells_the_last_numbers() -> None:
    step, loss, val_loss = (np.array(v) for v in ([1.0, 2000.0], [5.0, 1.5], [1.61, 1.64]))
    assert _title(step, (step, loss), (step, val_loss)) == (
        "step 2,000    training loss 1.5000 (smoothed)    validation loss 1.6400 (lowest 1.6100)"
    )


def test_each_run_has_its_own_colour_and_each_layer_too(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", layers=0, scale=1 + i / 3) for i in range(3)]
    for count in (1, 3):
        png, _ = write_report(runs[:count], tmp_path / "report")
        found = [pixels(png, colour) > 300 for colour in COLOURS]
        assert found == [i < count for i in range(len(COLOURS))]
        assert pixels(png, FIRST_LAYER) == 0
    png, _ = write_report([write_run(tmp_path / "d", layers=2)], tmp_path / "report")
    # One row of panels in all; the colour bar is a shade for itself.
    assert pixels(png, FIRST_LAYER) > 300 and pixels(png, DEEP_LAYER) > 300


@pytest.mark.parametrize("x", ["step", "tokens", "seconds"])
def test_runs_of_every_kind_and_name_are_drawn_without_a_warning(tmp_path: Path, x: str) -> None:
    folders = [
        write_run(tmp_path / "_whole $x_1$", sources=SOURCES),
        write_run(tmp_path / "short", steps=7, validate_every=0),
        write_run(tmp_path / "one row", steps=1, layers=1),
        write_run(tmp_path / "\u4e2d", steps=0, layers=0),
        write_run(tmp_path / "cut short"),
        write_run(tmp_path / "no header"),
        write_run(tmp_path / "zeros"),
    ]
    text = (folders[4] / "metrics.csv").read_text()
    (folders[4] / "metrics.csv").write_text(text[:-30])
    (folders[5] / "metrics.csv").write_text("step,lo")
    (folders[6] / "metrics.csv").write_text("step,loss,lr,grad_norm\n1,0,0,0\n2,-1,0,nan\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = [[folder] for folder in folders] if x == "step" else []
        for chosen in (folders, *alone):
            for path in write_report(chosen, tmp_path / "report", x=x, say=lambda line: None):  # type: ignore[arg-type]
                assert path.stat().st_size > 5000
    assert sorted(p.name for p in tmp_path.glob("*report*")) == ["report.html", "report.png"]


def test_a_run_without_the_values_of_the_axis_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2.5\n")
    told: list[str] = []
    write_report([tmp_path], x="tokens", say=told.append)
    assert told == [
        f"{tmp_path.name} is not drawn over tokens: its metrics.csv has no values of that column"
    ]
    (tmp_path / "metrics.csv").write_text("step,loss\n1,abc\n")
    write_report([tmp_path], say=told.append)
    assert told[1:] == [
        f"{tmp_path.name} has no training loss: its metrics.csv has no number in that column"
    ]


def test_the_report_lies_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = write_run(Path("a"), steps=2), write_run(Path("b"), steps=2)
    (tmp_path / "folder").mkdir()
    for runs, output, stem in (
        ([a], None, "a/report"),
        ([a / "metrics.csv"], None, "a/report"),
        ([a, b], None, "report"),
        ([a], "new/name", "new/name"),
        ([a], "other.html", "other"),
        ([a], "v1.5", "v1.5"),
        ([a], "folder", "folder/report"),
        ([a], "made/", "made/report"),
    ):
        assert _outputs(output, find_runs(runs)) == (Path(f"{stem}.png"), Path(f"{stem}.html"))
    assert write_report([a], "made/") == (Path("made/report.png"), Path("made/report.html"))
    assert Path("made/report.png").exists() and Path("made/report.html").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_run_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    (run / "metrics.csv").write_text("this would be refused too\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file is a file"):
        write_report([run], tmp_path / "file" / "report")
    with pytest.raises(UserError, match=r"holds no training metrics"):
        write_report([run])
    with pytest.raises(UserError, match=r"smooth=1.5 must be a share"):
        write_report([run], share=1.5)
    assert {p.name for p in run.iterdir()} == {
        "metrics.csv",
        "layers.csv",
        "config.yaml",
        "train_log.txt",
    }


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    png, html = write_report([run])
    before = png.read_bytes(), html.read_bytes()
    write_run(run, steps=30)
    write_report([run])
    assert png.read_bytes() != before[0] and html.read_bytes() != before[1]
    assert not list(run.glob(".tmp*"))
