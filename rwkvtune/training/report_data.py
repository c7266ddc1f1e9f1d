"""What a report shows: the runs that were named, their curves, and how they differ."""

from __future__ import annotations

import difflib
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.training.log import (
    LAYERS_NEED,
    METRICS_NEED,
    PER_SOURCE,
    duration,
    read_columns,
    short_number,
)

Axis = Literal["step", "tokens", "seconds"]
Columns = dict[str, np.ndarray]
"""fp64 [rows] by column name, nan where a cell is empty."""

SMOOTHED_SHARE = 0.05
"""Width of the smoothing window as a share of the run, unless another is asked for."""

MAX_POINTS = 2000
"""Of a curve; a screen has no room for more."""


@dataclass(frozen=True)
class Run:
    name: str
    """The end of its path, as long as it takes to tell it from the other runs of the report."""
    metrics: Columns
    """Of metrics.csv, sorted by step."""
    layers: list[Columns]
    """Of layers.csv, per block; empty for a run without that file."""
    settings: dict[str, Any]
    """Of config.yaml; empty where there is none that can be read."""

    def curve(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a column of metrics.csv."""
        return finite(self.metrics, column)

    def along(self, axis: Axis, steps: np.ndarray) -> np.ndarray:
        """The steps in other words: tokens or seconds of training up to each."""
        if axis == "step":
            return steps
        known, values = self.curve(axis)
        if not len(known):
            return np.full_like(steps, math.nan)
        along: np.ndarray = np.interp(steps, known, values)
        return along


@dataclass(frozen=True)
class Panel:
    """One chart over the steps: a curve per run."""

    column: str
    title: str
    unit: str
    is_loss: bool = False
    is_noisy: bool = False
    """Shown smoothed as well."""
    from_zero: bool = False
    """The axis begins at zero."""


@dataclass(frozen=True)
class LayerPanel:
    """One chart of a run over the steps: a curve per block and column."""

    columns: tuple[str, ...]
    title: str
    unit: str
    is_noisy: bool = False


LAYER_PANELS = (
    LayerPanel(("att_grad_norm",), "Gradient norm of time mix", "L2 norm", is_noisy=True),
    LayerPanel(("ffn_grad_norm",), "Gradient norm of channel mix", "L2 norm", is_noisy=True),
    LayerPanel(
        ("decay_mean", "decay_min", "decay_max"),
        "Decay by the bias alone: mean, min, max",
        "share kept per token",
    ),
)


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The charts for which any of the runs has values; the training loss always."""
    sources = dict.fromkeys(c for run in runs for c in run.metrics if c.startswith(PER_SOURCE))
    per_token = "nats per token"
    found = [
        Panel("loss", "Training loss", per_token, is_loss=True, is_noisy=True),
        Panel("val_loss", "Validation loss", per_token, is_loss=True),
        *(
            Panel(c, f"Validation loss: {c.removeprefix(PER_SOURCE)}", per_token, is_loss=True)
            for c in sources
        ),
        Panel("lr", "Learning rate", "learning rate", from_zero=True),
        Panel("grad_norm", "Gradient norm before clipping", "L2 norm", is_noisy=True),
        Panel("tokens_per_s", "Speed", "tokens per second", is_noisy=True, from_zero=True),
    ]
    return [p for p in found if p.column == "loss" or any(len(r.curve(p.column)[0]) for r in runs)]


def axis_unit(runs: Sequence[Run], axis: Axis) -> tuple[str, float]:
    """What the x axis says, and how many steps, tokens or seconds are one of its units."""
    if axis == "step":
        return "optimizer step", 1.0
    if axis == "tokens":
        return "tokens", 1.0
    longest = max((_last(run, "seconds") or 0.0 for run in runs), default=0.0)
    for unit, seconds in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * seconds:
            return f"{unit} of training", seconds
    return "seconds of training", 1.0


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The metrics.csv of each run that was named by it or by its folder; one named twice counts
    once. UserError about all paths that are no runs, with the nearest ones that are."""
    found: dict[Path, Path] = {}
    problems, wrong = [], []
    for path in map(Path, paths):
        # os.path's own questions: what this user may not look at is no run, and no crash.
        file = path / "metrics.csv" if os.path.isdir(path) else path
        if os.path.isfile(file):
            found.setdefault(file.resolve(), file)
            continue
        wrong.append(path)
        problems.append(
            f"{path} is no run folder: it has no metrics.csv"
            if os.path.isdir(path)
            else f"{path} does not exist"
        )
    if problems:
        near = dict.fromkeys(folder for path in wrong for folder in _near_runs(path))
        hint = f"run folders near it: {', '.join(map(str, near))}" if near else "no run is near it"
        kind = UserError if any(map(os.path.isdir, wrong)) else MissingFileError
        raise kind(f"{'; '.join(problems)}. Give run folders (proj_dir) of rwkvtune train; {hint}")
    return list(found.values())


def _near_runs(path: Path, *, at_most: int = 3) -> list[Path]:
    """Folders with a metrics.csv below `path`, or else around it; those of similar names first."""
    place = Path(os.path.normpath(path))
    for _ in range(3):
        below = [
            folder for folder in _folders_below(place) if os.path.isfile(folder / "metrics.csv")
        ]
        if below:
            break
        place = place.parent

    def similarity(folder: Path) -> float:
        return difflib.SequenceMatcher(None, str(folder), str(path)).ratio()

    return sorted(below, key=similarity, reverse=True)[:at_most]


def _folders_below(place: Path, *, depth: int = 3, at_most: int = 1000) -> Iterator[Path]:
    """The folder and those in it, nearest first, hidden ones left out; it may be a large disk."""
    waiting = deque([(place, 0)] if os.path.isdir(place) else [])
    for _ in range(at_most):
        if not waiting:
            return
        folder, level = waiting.popleft()
        yield folder
        if level == depth:
            continue
        try:
            inside = sorted(e.path for e in os.scandir(folder) if e.is_dir(follow_symlinks=False))
        except OSError:  # not ours to read
            continue
        waiting += [(Path(p), level + 1) for p in inside if not os.path.basename(p).startswith(".")]


def read_runs(files: Sequence[Path]) -> list[Run]:
    """Read each metrics.csv with what lies beside it. UserError for one that is no such file."""
    return [
        Run(
            name,
            _read_metrics(file),
            _read_layers(file.parent / "layers.csv"),
            _read_settings(file.parent / "config.yaml"),
        )
        for name, file in zip(run_names(files), files, strict=True)
    ]


def run_names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ; a run's own metrics.csv goes without saying."""
    paths = [f.resolve() for f in files]
    parts = [(p.parent if p.name == "metrics.csv" else p).parts for p in paths]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(p[-length:] == own[-length:] for p in parts) > 1:
            length += 1
        names.append(str(Path(*own[-length:])))
    return names


def _read_metrics(file: Path) -> Columns:
    return _sorted_by_step(_as_arrays(read_columns(file, needed=METRICS_NEED)))


def _read_layers(file: Path) -> list[Columns]:
    columns = _sorted_by_step(_as_arrays(read_columns(file, needed=LAYERS_NEED)))
    layer = columns.get("layer", np.empty(0))
    return [{c: v[layer == i] for c, v in columns.items()} for i in np.unique(finite_only(layer))]


def _as_arrays(columns: Mapping[str, Any]) -> Columns:
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


def _sorted_by_step(columns: Columns) -> Columns:
    if not columns:
        return {}
    order = np.argsort(columns["step"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _read_settings(file: Path) -> dict[str, Any]:
    """Empty when the file is missing or cannot be read: a report is about the curves."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {str(k): v for k, v in content.items()} if isinstance(content, dict) else {}


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Per setting that is not the same in all runs, its value in each; proj_dir left out."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "proj_dir")
    values = {name: [shown(run.settings, name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def shown(settings: Mapping[str, Any], name: str) -> str:
    """A setting as its YAML file has it."""
    if name not in settings:
        return "not known"
    value = settings[name]
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "(empty)" if value == "" else str(value)


def summary(run: Run, share: float) -> dict[str, str]:
    """The numbers that a table of runs shows, by heading; losses in nats per token."""
    steps, tokens, seconds = (_last(run, name) for name in ("step", "tokens", "seconds"))
    _, speeds = run.curve("tokens_per_s")
    row = {
        "steps": "none yet" if steps is None else f"{steps:,.0f}",
        "tokens": "" if tokens is None else short_number(tokens),
        "training time": "" if seconds is None else duration(seconds),
        "tokens/s, median": short_number(float(np.median(speeds))) if len(speeds) else "",
    }
    x, y = run.curve("loss")
    smooth = smoothed(x, y, share)
    row["training loss, smoothed"] = shown_loss(smooth[-1]) if len(y) else ""
    row["lowest"] = shown_loss(smooth.min()) if len(y) else ""
    x, y = run.curve("val_loss")
    row["validation loss"] = shown_loss(y[-1]) if len(y) else ""
    row["lowest, at step"] = f"{shown_loss(y.min())}, {x[y.argmin()]:,.0f}" if len(y) else ""
    return row


def shown_loss(value: float) -> str:
    """Four decimals, unless the run has diverged beyond reason."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def _last(run: Run, column: str) -> float | None:
    _, values = run.curve(column)
    return float(values[-1]) if len(values) else None


def finite(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows in which the column is a finite number."""
    if name not in columns:
        return np.empty(0), np.empty(0)
    there = np.isfinite(columns[name])
    return columns["step"][there], columns[name][there]


def finite_only(values: np.ndarray) -> np.ndarray:
    there: np.ndarray = values[np.isfinite(values)]
    return there


def smoothed(x: np.ndarray, y: np.ndarray, share: float = SMOOTHED_SHARE) -> np.ndarray:
    """Mean of the values within half a window to either side, in steps. The window is narrower near
    the first step, so that the steep start stays true, and looks only back at the last one."""
    if not len(x):
        return y
    reach = np.minimum(share / 2 * (x[-1] - x[0]), x - x[0])
    first = np.searchsorted(x, x - reach, side="left")
    after = np.searchsorted(x, x + reach, side="right")
    sums = np.concatenate([[0.0], np.cumsum(y)])
    smooth: np.ndarray = (sums[after] - sums[first]) / (after - first)
    return smooth


def thinned(
    x: np.ndarray, y: np.ndarray, at_most: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points of a curve that look the same: of each group of neighbours the lowest
    and the highest, and both ends."""
    if len(x) <= at_most:
        return x, y
    keep = {0, len(x) - 1}
    for begin, end in _groups(len(x), (at_most - 2) // 2):
        keep |= {begin + int(y[begin:end].argmin()), begin + int(y[begin:end].argmax())}
    indices = sorted(keep)
    return x[indices], y[indices]


def group_means(
    x: np.ndarray, y: np.ndarray, at_most: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each group that `thinned` makes, for smoothing: lowest and highest values alone
    have another mean than the curve."""
    bounds = _groups(len(x), (at_most - 2) // 2)
    return (
        np.array([x[begin:end].mean() for begin, end in bounds]),
        np.array([y[begin:end].mean() for begin, end in bounds]),
    )


def _groups(count: int, groups: int) -> list[tuple[int, int]]:
    """Bounds of so many groups of neighbours, equally large to one."""
    edges = np.linspace(0, count, groups + 1).astype(int).tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))
