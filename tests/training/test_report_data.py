"""Which runs a report shows, and what becomes of their numbers, against numpy and plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.training.report_data import (
    differing_settings,
    find_runs,
    group_means,
    panels,
    read_runs,
    run_names,
    smoothed,
    summary,
    thinned,
)
from tests.training.report_runs import SOURCES, loss_at, write_run


def test_a_thinned_curve_keeps_the_lowest_and_highest_of_every_stretch() -> None:
    dice = np.random.default_rng(0)
    x, y = np.arange(1.0, 50001.0), dice.normal(size=50000)
    y[31234], y[7] = 99.0, -99.0
    thin_x, thin_y = thinned(x, y, 2000)
    assert len(thin_x) <= 2000
    assert (np.diff(thin_x) > 0).all() and (y[thin_x.astype(int) - 1] == thin_y).all()
    assert thin_x[0] == 1 and thin_x[-1] == 50000
    assert thin_y.max() == 99.0 and thin_y.min() == -99.0
    group = 50000 // 999 + 1
    for begin in dice.integers(group, 50000 - 400, size=200):
        inside = y[begin : begin + 300]
        near = (thin_x > begin - group) & (thin_x <= begin + 300 + group)
        assert thin_y[near].min() <= inside.min() and thin_y[near].max() >= inside.max()


def test_a_short_curve_stays_as_it_is() -> None:
    x = np.arange(2000.0)
    thin_x, thin_y = thinned(x, x * x)
    assert (thin_x == x).all() and (thin_y == x * x).all()


def test_group_means_have_the_mean_of_the_whole_curve_and_thinned_points_need_not() -> None:
    dice = np.random.default_rng(0)
    x, y = np.arange(9990.0), dice.exponential(size=9990)  # 10 rows in each of 999 groups
    means = group_means(x, y, 2000)
    assert np.allclose(means[0], x.reshape(999, 10).mean(axis=1))
    assert np.allclose(means[1], y.reshape(999, 10).mean(axis=1))
    assert abs(thinned(x, y, 2000)[1].mean() - y.mean()) > 0.3


def test_smoothing_keeps_straight_lines_and_averages_noise_away() -> None:
    x = np.arange(1.0, 1001.0)
    line = 5 - 0.003 * x
    smooth = smoothed(x, line)
    # A window of 50 steps, 25 to each side; at the end only the 25 before are there.
    assert np.allclose(smooth[:974], line[:974])
    assert smooth[-1] == pytest.approx(line[-25:].mean(), abs=2e-3)
    noisy = line + np.where(x % 2 == 0, 0.1, -0.1)
    assert np.abs(smoothed(x, noisy) - line)[25:975].max() < 0.01
    assert np.allclose(smoothed(x, noisy, 0.0), noisy)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["out/a"], ["a"]),
        (["out/a", "out/b"], ["a", "b"]),
        (["x/run", "y/run", "y/other"], ["x/run", "y/run", "other"]),
        (["1/x/run", "1/y/run", "2/y/run"], ["x/run", "1/y/run", "2/y/run"]),
        (["run", "deep/run"], [None, "deep/run"]),
    ],
)
def test_names_are_the_shortest_that_tell_runs_apart(
    folders: list[str], names: list[str | None], tmp_path: Path
) -> None:
    found = run_names([tmp_path / folder / "metrics.csv" for folder in folders])
    assert found == [name or f"{tmp_path.name}/run" for name in names]


def test_runs_are_found_by_folder_or_file_and_each_once(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", steps=2), write_run(tmp_path / "b", steps=2)
    assert find_runs([a, b / "metrics.csv", a / "metrics.csv", str(b) + "/"]) == [
        a / "metrics.csv",
        b / "metrics.csv",
    ]


def test_what_is_no_run_is_told_all_at_once_with_the_nearest_runs(tmp_path: Path) -> None:
    for name in ("out/lr-1", "out/lr-2", "elsewhere/far/run"):
        write_run(tmp_path / name, steps=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"lr-3 does not exist.* near it: \S+lr-[12], "):
        find_runs([tmp_path / "out" / "lr-3"])
    with pytest.raises(UserError) as told:
        find_runs([tmp_path / "out", tmp_path / "out" / "lr-1", tmp_path / "empty"])
    message = str(told.value)
    assert f"{tmp_path / 'out'} is no run folder: it has no metrics.csv" in message
    assert f"{tmp_path / 'empty'} is no run folder" in message and "\n" not in message
    assert str(tmp_path / "out" / "lr-2") in message and "run folders near it" in message


def test_settings_that_differ_are_listed_as_their_files_have_them(tmp_path: Path) -> None:
    for name, settings in (
        ("a", "lr_init: 0.001\nn_layer: 2\nproj_dir: a\ngrad_cp: false\n"),
        ("b", "lr_init: 0.003\nn_layer: 2\nproj_dir: b\ngrad_cp: true\nwandb: ''\n"),
        ("c", "- no\n- settings\n"),
    ):
        write_run(tmp_path / name, steps=1, settings=settings)
    a, b, c = read_runs([tmp_path / name / "metrics.csv" for name in "abc"])
    assert differing_settings([a, b]) == {
        "lr_init": ["0.001", "0.003"],
        "grad_cp": ["false", "true"],
        "wandb": ["not known", "(empty)"],
    }
    assert c.settings == {} and differing_settings([a, a]) == {}


def test_the_summary_has_last_and_lowest_losses_and_where_the_run_is(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path, steps=40) / "metrics.csv"])
    assert summary(run, 0.0) == {
        "steps": "40",
        "tokens": "20.5k",
        "training time": "0:20",
        "tokens/s, median": "900",
        "training loss, smoothed": f"{loss_at(40):.4f}",
        "lowest": f"{min(map(loss_at, range(1, 41))):.4f}",
        "validation loss": "2.5250",
        "lowest, at step": "2.5250, 40",
    }


def test_panels_are_those_that_some_run_has_values_for(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", validate_every=0)
    rich = write_run(tmp_path / "rich", sources=SOURCES)
    files = [plain / "metrics.csv", rich / "metrics.csv"]
    rest = ["lr", "grad_norm", "tokens_per_s"]
    assert [p.column for p in panels(read_runs(files[:1]))] == ["loss", *rest]
    both = panels(read_runs(files))
    assert [p.column for p in both] == ["loss", "val_loss", *SOURCES, *rest]
    assert both[2].title == "Validation loss: plays"


def test_steps_become_tokens_and_seconds_also_between_two_rows(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path, steps=10) / "metrics.csv"])
    steps = np.array([1.0, 2.5, 10.0])
    assert run.along("tokens", steps).tolist() == [512.0, 1280.0, 5120.0]
    assert run.along("seconds", steps).tolist() == [0.5, 1.25, 5.0]


def test_layers_are_told_apart_and_a_run_without_them_has_none(tmp_path: Path) -> None:
    with_layers = write_run(tmp_path / "new", steps=3, layers=2)
    older = write_run(tmp_path / "old", steps=3, layers=0)
    new, old = read_runs([with_layers / "metrics.csv", older / "metrics.csv"])
    assert old.layers == [] and not (older / "layers.csv").exists()
    assert [layer["att_grad_norm"].tolist() for layer in new.layers] == [[0.1] * 3, [0.2] * 3]
    assert new.layers[1]["step"].tolist() == [1.0, 2.0, 3.0]
