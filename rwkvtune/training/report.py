"""A picture of a run, drawn from its metrics.csv."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from rwkvtune.files import atomic_write
from rwkvtune.training.log import read_metrics

TRAINING, VALIDATION, RATE = "#3a6ea5", "#d1495b", "#6b7280"

SMOOTHED_SHARE = 0.05
"""Width of the smoothing window as a share of the run."""


def draw_loss_curve(metrics_csv: str | Path, png_path: str | Path) -> None:
    """Draw training loss, validation loss and learning rate over the steps into a PNG file.

    The training loss is shown as logged (thin) and smoothed (bold). A run without rows gives a
    picture that says so. UserError when the file holds no metrics.
    """
    rows = [row.values for row in read_metrics(metrics_csv)]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    step = _column(rows, "step")
    loss, val_loss, rate = (_column(rows, name) for name in ("loss", "val_loss", "lr"))
    _draw_losses(loss_axes, step, loss, val_loss)
    rate_axes.plot(*_finite(step, rate), color=RATE, marker=_dot_if_alone(rate))
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


def _draw_losses(axes: Axes, step: np.ndarray, loss: np.ndarray, val_loss: np.ndarray) -> None:
    axes.set_ylabel("loss, nats per token")
    x, y = _finite(step, loss)
    val_x, val_y = _finite(step, val_loss)
    if len(x):
        smooth = _smooth(x, y)
        axes.plot(x, y, color=TRAINING, alpha=0.35, lw=0.8)
        axes.plot(x, smooth, color=TRAINING, lw=1.8, label="training", marker=_dot_if_alone(loss))
    if len(val_x):
        axes.plot(val_x, val_y, "o-", color=VALIDATION, ms=4, lw=1.2, label="validation")
    if len(x) or len(val_x):
        _set_loss_scale(axes, np.concatenate([y, val_y]))
        axes.legend(frameon=False)


def _title(step: np.ndarray, loss: np.ndarray, val_loss: np.ndarray) -> str:
    if not len(step):
        return "no steps logged yet"
    parts = [f"step {step.max():,.0f}"]
    x, y = _finite(step, loss)
    if len(x):
        parts.append(f"training loss {_smooth(x, y)[-1]:.4f} (smoothed)")
    _, val_y = _finite(step, val_loss)
    if len(val_y):
        parts.append(f"validation loss {val_y[-1]:.4f} (lowest {val_y.min():.4f})")
    return "    ".join(parts)


def _column(rows: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([row.get(name, math.nan) for row in rows], dtype=np.float64)


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = np.isfinite(y)
    return x[there], y[there]


def _dot_if_alone(values: np.ndarray) -> str:
    """A line through a single point would be invisible."""
    return "o" if np.isfinite(values).sum() == 1 else ""


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean of the values within half a window to either side, in steps. The window is narrower near
    the first step, so that the steep start stays true, and looks only back at the last one."""
    half = SMOOTHED_SHARE / 2 * (x[-1] - x[0])
    reach = np.minimum(half, x - x[0])
    first = np.searchsorted(x, x - reach, side="left")
    after = np.searchsorted(x, x + reach, side="right")
    sums = np.concatenate([[0.0], np.cumsum(y)])
    smooth: np.ndarray = (sums[after] - sums[first]) / (after - first)
    return smooth


def _set_loss_scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic, so that the long flat part gets more room than the first steep one."""
    low, high = values.min(), values.max()
    if low <= 0 or high / low < 1.5:
        return
    axes.set_yscale("log")
    if high / low < 20:  # else the scale's own powers of ten are right
        ticks = {float(f"{value:.2g}") for value in np.geomspace(low, high, 9)}
        axes.yaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.yaxis.set_minor_locator(NullLocator())
