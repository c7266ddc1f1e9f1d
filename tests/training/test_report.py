"""The picture of a run, decoded again."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rwkvtune.errors import UserError
from rwkvtune.training.log import RunLog
from rwkvtune.training.report import TRAINING, VALIDATION, _title, draw_loss_curve
from rwkvtune.training.report_data import smoothed


def write_run(folder: Path, steps: int, validate_every: int = 0) -> Path:
    log = RunLog(folder, total_steps=steps, stream=io.StringIO())
    log.start({}, "name")
    for step in range(1, steps + 1):
        if validate_every and step % validate_every == 0:
            log.validation({"step": step, "val_loss": 2 + 3 / step})
        log.step({"step": step, "loss": 2 + 3 / step, "lr": 1e-3})
    log.close()
    return folder / "metrics.csv"


def pixels(path: Path, colour: str) -> int:
    """How many pixels have exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return int((np.asarray(image.convert("RGB")) == wanted).all(axis=-1).sum())


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_training_and_validation_are_drawn(tmp_path: Path, steps: int) -> None:
    png = tmp_path / "loss.png"
    draw_loss_curve(write_run(tmp_path, steps), png)
    assert pixels(png, TRAINING) > 25 and pixels(png, VALIDATION) == 0
    draw_loss_curve(write_run(tmp_path, steps, validate_every=1), png)
    assert pixels(png, VALIDATION) > 25


def test_a_run_that_logged_nothing_or_has_no_file_still_gives_a_picture(tmp_path: Path) -> None:
    for metrics in (write_run(tmp_path, 0), tmp_path / "none.csv"):
        draw_loss_curve(metrics, tmp_path / "loss.png")
        assert pixels(tmp_path / "loss.png", TRAINING) == 0
    assert [p.name for p in tmp_path.glob(".tmp*")] == []


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, 9)
    metrics.write_text(metrics.read_text().replace("2.5,", "nan,").replace("2.75,", "inf,"))
    draw_loss_curve(metrics, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", TRAINING) > 25


def test_a_file_that_is_no_metrics_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("hello\n")
    with pytest.raises(UserError, match="notes.csv holds no training metrics"):
        draw_loss_curve(tmp_path / "notes.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_straight_lines_and_averages_noise_away() -> None:
    x = np.arange(1.0, 1001.0)
    line = 5 - 0.003 * x
    smooth = smoothed(x, line)
    # A window of 50 steps, 25 to each side; at the end only the 25 before are there.
    assert np.allclose(smooth[:974], line[:974])
    assert smooth[-1] == pytest.approx(line[-25:].mean(), abs=2e-3)
    noisy = line + np.where(x % 2 == 0, 0.1, -0.1)
    assert np.abs(smoothed(x, noisy) - line)[25:975].max() < 0.01


def test_the_title_tells_the_last_numbers() -> None:
    step, loss, val_loss = (np.array(v) for v in ([1.0, 2000.0], [5.0, 1.5], [1.61, 1.64]))
    assert _title(step, (step, loss), (step, val_loss)) == (
        "step 2,000    training loss 1.5000 (smoothed)    validation loss 1.6400 (lowest 1.6100)"
    )
