"""Pictures of runs, drawn from their log files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    ScalarFormatter,
)

from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write, check_writable
from rwkvtune.training.log import METRICS_NEED, read_columns
from rwkvtune.training.report_data import (
    LAYER_PANELS,
    SMOOTHED_SHARE,
    Axis,
    LayerPanel,
    Panel,
    Run,
    axis_unit,
    find_runs,
    finite,
    panels,
    read_runs,
    shown_loss,
    smoothed,
    thinned,
)
from rwkvtune.training.report_page import write_page

TRAINING, VALIDATION, RATE = "#3a6ea5", "#d1495b", "#6b7280"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""One per run, told apart by colour-blind readers too.  Source: Okabe and Ito, "Color Universal
Design", 2008, without its black and yellow."""
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""After the last colour they begin again with the next of these."""

LAYER_COLOURS = colormaps["viridis"]
DEEPEST = 0.88
"""Of that scale: its last part, yellow, is hard to see on white."""

LOG_SCALE_FROM = 20.0
"""Norms whose highest and lowest values are so many times apart get a logarithmic axis."""


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    x: Axis = "step",
    share: float = SMOOTHED_SHARE,
    say: Callable[[str], None] = print,
) -> tuple[Path, Path]:
    """Draw runs side by side into a PNG and one HTML page; returns the two paths.

    paths: run folders, or their metrics.csv.
    output: the path of both without an ending, or a folder for them; None = report beside the
    metrics.csv of a single run, in the working folder for several.
    share: width of the smoothing window as a share of the run; 0 = as logged.
    say: gets a line about each run without a loss or that cannot be drawn over `x`.
    UserError before any reading for paths that are no runs and an output that cannot be written.
    """
    files = find_runs(paths)
    if not 0 <= share <= 1:
        raise UserError(f"smooth={share} must be a share of the run, from 0 to 1")
    png, html = _outputs(output, files)
    for path in (png, html):
        check_writable(path)
    runs = read_runs(files)
    for run in runs:
        if not len(run.curve("loss")[0]):
            say(f"{run.name} has no training loss: its metrics.csv has no number in that column")
        elif not len(run.curve(x)[0]):
            say(f"{run.name} is not drawn over {x}: its metrics.csv has no values of that column")
    picture = draw_report(runs, png, x=x, share=share)
    write_page(runs, html, picture=picture, x=x, share=share)
    return png, html


def _outputs(output: str | Path | None, files: Sequence[Path]) -> tuple[Path, Path]:
    if output is None:
        stem = files[0].parent / "report" if len(files) == 1 else Path("report")
    else:
        stem = Path(output)
        if stem.is_dir() or str(output).endswith(("/", "\\")):
            stem /= "report"
        elif stem.suffix in (".png", ".html"):
            stem = stem.with_suffix("")
    return stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.html")


@dataclass(frozen=True)
class _XAxis:
    """What all panels are drawn over."""

    axis: Axis
    label: str
    unit: float
    """Steps, tokens or seconds in one unit of the axis."""
    end: float

    @classmethod
    def of(cls, runs: Sequence[Run], axis: Axis) -> _XAxis:
        label, unit = axis_unit(runs, axis)
        steps = [run.metrics.get("step", np.empty(0))[-1:] for run in runs]
        ends = [v for run, s in zip(runs, steps, strict=True) for v in run.along(axis, s).tolist()]
        longest = max((end for end in ends if math.isfinite(end)), default=0.0)
        return cls(axis, label, unit, max(longest / unit, 1.0))

    def place(self, run: Run, steps: np.ndarray) -> np.ndarray:
        return run.along(self.axis, steps) / self.unit


def draw_report(
    runs: Sequence[Run], png_path: str | Path, *, x: Axis = "step", share: float = SMOOTHED_SHARE
) -> bytes:
    """Draw every curve of the runs into a PNG file and return its content.

    A panel per column of metrics.csv holds all runs; below, each run with a layers.csv has a row of
    panels with a curve per block.
    """
    wide, *others = panels(runs)
    beside = [p for p in others[:1] if p.column == "val_loss"]
    others = others[len(beside) :]
    with_layers = [run for run in runs if run.layers]
    over = _XAxis.of(runs, x)
    heights = [3.3] + [2.4] * (math.ceil(len(others) / 3) + len(with_layers))
    figure = Figure(figsize=(13, sum(heights) + 0.6 + 0.2 * len(runs)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)

    _draw_panel(figure.add_subplot(grid[0, : 4 if beside else 6]), wide, runs, over, share)
    for panel in beside:
        _draw_panel(figure.add_subplot(grid[0, 4:]), panel, runs, over, share)
    for i, panel in enumerate(others):
        row, column = 1 + i // 3, 2 * (i % 3)
        axes = figure.add_subplot(grid[row, column : column + 2])
        _draw_panel(axes, panel, runs, over, share)
    first = len(heights) - len(with_layers)
    _draw_layers(figure, grid, first, with_layers, over, share, len(runs) > 1)
    _name_runs(figure, runs, share)
    with warnings.catch_warnings():
        # A run's name may have letters that matplotlib's font lacks: boxes, in the picture only.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        atomic_write(png_path, lambda file: canvas.print_png(file, pil_kwargs={"optimize": True}))
    return Path(png_path).read_bytes()


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run], over: _XAxis, share: float) -> None:
    seen = []
    for i, run in enumerate(runs):
        colour, dash = _style(i)
        steps, values = run.curve(panel.column)
        if panel.is_noisy and share and len(values):
            thin = thinned(steps, values)
            axes.plot(over.place(run, thin[0]), thin[1], color=colour, alpha=0.25, lw=0.7)
            values = smoothed(steps, values, share)
        seen.append(values)
        steps, values = thinned(steps, values)
        few = 60 if panel.column.startswith("val_loss") else 1
        marker = "o" if len(values) <= few else ""
        every = max(1, len(values) // 15)
        axes.plot(
            over.place(run, steps),
            values,
            lw=1.7,
            marker=marker,
            ms=3.5,
            markevery=every,
            color=colour,
            ls=dash,
        )
    everything = np.concatenate(seen)
    title = axes.set_title(_short(panel.title, 44), loc="left", fontsize=11)
    title.set_parse_math(False)  # it may hold the name of a file
    axes.set_ylabel(panel.unit)
    _finish(axes, over)
    if not len(everything):
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center")
    elif panel.is_loss:
        _set_loss_scale(axes, everything)
    elif panel.from_zero:
        axes.set_ylim(0, None)
    else:
        _set_norm_scale(axes, everything)
    if panel.column == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.column == "tokens_per_s":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_layers(
    figure: Figure,
    grid: GridSpec,
    first_row: int,
    runs: Sequence[Run],
    over: _XAxis,
    share: float,
    is_named: bool,
) -> None:
    """A row per run; a column of panels has one scale, so that runs can be compared."""
    columns: list[list[Axes]] = [[] for _ in LAYER_PANELS]
    for row, run in enumerate(runs):
        for place, panel in enumerate(LAYER_PANELS):
            cell = grid[first_row + row, 2 * place : 2 * place + 2]
            above = columns[place][0] if columns[place] else None
            axes = figure.add_subplot(cell, sharey=above)
            columns[place].append(axes)
            _draw_layer_panel(axes, panel, run, over, share)
            _finish(axes, over)
        deepest = len(run.layers) - 1
        scale = Normalize(0, max(deepest / DEEPEST, 1))
        bar = figure.colorbar(
            ScalarMappable(scale, LAYER_COLOURS),
            ax=[c[row] for c in columns],
            label="layer",
            aspect=14,
            fraction=0.03,
            pad=0.01,
            ticks=MaxNLocator(integer=True, nbins=6),
        )
        bar.ax.set_ylim(0, max(deepest, 0.5))
        if is_named:
            columns[0][row].annotate(
                f"Layers of {_short(run.name)}",
                xy=(0, 1),
                xycoords="axes fraction",
                xytext=(0, 24),
                textcoords="offset points",
                weight="bold",
                parse_math=False,
            )
    for place, panel in enumerate(LAYER_PANELS):
        values = [
            finite(layer, name)[1] for run in runs for layer in run.layers for name in panel.columns
        ]
        if values and panel.is_noisy:
            _set_norm_scale(columns[place][0], np.concatenate(values))


def _draw_layer_panel(axes: Axes, panel: LayerPanel, run: Run, over: _XAxis, share: float) -> None:
    for i, layer in enumerate(run.layers):
        colour = LAYER_COLOURS(DEEPEST * i / max(len(run.layers) - 1, 1))
        for name in panel.columns:
            steps, values = finite(layer, name)
            if panel.is_noisy and share:
                values = smoothed(steps, values, share)
            steps, values = thinned(steps, values)
            is_extreme = name.endswith(("_min", "_max"))
            axes.plot(
                over.place(run, steps),
                values,
                color=colour,
                lw=0.9 if is_extreme else 1.4,
                ls=":" if is_extreme else "-",
                marker=_dot_if_alone(values),
            )
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_ylabel(panel.unit)


def _finish(axes: Axes, over: _XAxis) -> None:
    """What all panels have in common: the same x axis, a grid, no frame."""
    axes.set_xlabel(over.label)
    axes.set_xlim(0, over.end * 1.01)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=over.axis == "step")
    )
    if over.axis == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name_runs(figure: Figure, runs: Sequence[Run], share: float) -> None:
    """Above the panels: which colour is which run, and what it reached."""
    labels = []
    for run in runs:
        parts = [_short(run.name)]
        steps, values = run.curve("loss")
        if len(values):
            parts.append(f"step {steps[-1]:,.0f}")
            last = smoothed(steps, values, share)[-1]
            parts.append(f"training loss {shown_loss(last)} (smoothed)")
        _, values = run.curve("val_loss")
        if len(values):
            last, lowest = shown_loss(values[-1]), shown_loss(values.min())
            parts.append(f"validation loss {last} (lowest {lowest})")
        labels.append(
            "    ".join(parts) if len(parts) > 1 else f"{parts[0]}    no steps logged yet"
        )
    styles = [_style(i) for i in range(len(runs))]
    handles = [Line2D([], [], lw=3, color=colour, ls=dash) for colour, dash in styles]
    legend = figure.legend(
        handles, ["run"] * len(runs), loc="outside upper left", frameon=False, fontsize=11
    )
    # Set afterwards: a label that begins with _ would be left out, and $ would begin a formula.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _style(run: int) -> tuple[str, Any]:
    """Colour and dashes of a run by its place in the report."""
    return COLOURS[run % len(COLOURS)], DASHES[run // len(COLOURS) % len(DASHES)]


def _short(name: str, at_most: int = 60) -> str:
    return name if len(name) <= at_most else f"...{name[3 - at_most :]}"


def draw_loss_curve(metrics_csv: str | Path, png_path: str | Path) -> None:
    """Draw training loss, validation loss and learning rate over the steps into a PNG file.

    The training loss is shown as logged (thin) and smoothed (bold). A run without rows gives a
    picture that says so. UserError when the file holds no metrics.
    """
    columns = read_columns(metrics_csv, needed=METRICS_NEED)
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    step = arrays.get("step", np.empty(0))
    loss, val_loss, rate = (finite(arrays, name) for name in ("loss", "val_loss", "lr"))
    _draw_losses(loss_axes, loss, val_loss)
    rate_axes.plot(*rate, color=RATE, marker=_dot_if_alone(rate[1]))
    rate_axes.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    rate_axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(step):
        rate_axes.set_xlim(0, max(step.max(), 1) * 1.01)
    for axes in (loss_axes, rate_axes):
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    loss_axes.set_title(_title(step, loss, val_loss), loc="left", fontsize=11)
    atomic_write(png_path, lambda file: canvas.print_png(file))


Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""


def _draw_losses(axes: Axes, loss: Curve, val_loss: Curve) -> None:
    axes.set_ylabel("loss, nats per token")
    if len(loss[0]):
        axes.plot(*loss, color=TRAINING, alpha=0.35, lw=0.8)
        smooth = smoothed(*loss)
        marker = _dot_if_alone(smooth)
        axes.plot(loss[0], smooth, color=TRAINING, lw=1.8, label="training", marker=marker)
    if len(val_loss[0]):
        axes.plot(*val_loss, "o-", color=VALIDATION, ms=4, lw=1.2, label="validation")
    if len(loss[0]) or len(val_loss[0]):
        _set_loss_scale(axes, np.concatenate([loss[1], val_loss[1]]))
        axes.legend(frameon=False)


def _title(step: np.ndarray, loss: Curve, val_loss: Curve) -> str:
    if not len(step):
        return "no steps logged yet"
    parts = [f"step {step.max():,.0f}"]
    if len(loss[0]):
        parts.append(f"training loss {smoothed(*loss)[-1]:.4f} (smoothed)")
    if len(val_loss[0]):
        lowest = val_loss[1].min()
        parts.append(f"validation loss {val_loss[1][-1]:.4f} (lowest {lowest:.4f})")
    return "    ".join(parts)


def _dot_if_alone(values: np.ndarray) -> str:
    """A line through a single point would be invisible."""
    return "o" if len(values) == 1 else ""


def _set_loss_scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic, so that the long flat part gets more room than the first steep one."""
    low, high = values.min(), values.max()
    if low <= 0 or high / low < 1.5:
        return
    axes.set_yscale("log")
    if high / low < 20:  # else the scale's own powers of ten are right
        if high / low < 4:
            ticks = MaxNLocator(7).tick_values(low, high)
        else:
            ticks = [float(f"{value:.2g}") for value in np.geomspace(low, high, 9)]
        axes.yaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.yaxis.set_minor_locator(NullLocator())


def _set_norm_scale(axes: Axes, values: np.ndarray) -> None:
    positive = values[values > 0]
    if len(positive) == len(values) > 0 and positive.max() / positive.min() > LOG_SCALE_FROM:
        axes.set_yscale("log")
        if positive.max() / positive.min() < 1e4:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
