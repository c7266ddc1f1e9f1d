"""The report as one HTML page that needs nothing else: report_page.html filled with the runs."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rwkvtune.files import atomic_write
from rwkvtune.training.report_data import (
    LAYER_PANELS,
    MAX_POINTS,
    Axis,
    Columns,
    Run,
    axis_unit,
    differing_settings,
    finite,
    group_means,
    panels,
    shown,
    summary,
    thinned,
)

TEMPLATE = Path(__file__).with_name("report_page.html")

LAYER_POINTS = MAX_POINTS // 5
"""Of a block's curve: there are many of them, in small charts."""


def write_page(
    runs: Sequence[Run], path: str | Path, *, picture: bytes, x: Axis, share: float
) -> None:
    """Write the page; it opens without a network and asks for no other file.

    picture: a PNG of the same, for readers without JavaScript.
    """
    names = ", ".join(run.name for run in runs)
    title = f"Training report: {names if len(names) <= 80 else f'{len(runs)} runs'}"
    parts = {
        "title": escape(title),
        "drawn": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "summary": _summary_table(runs, share),
        "settings": _settings(runs),
        "picture": base64.b64encode(picture).decode(),
        "data": _embedded(_data(runs, x, share)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    # In one pass: a run may be named {{data}}.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    atomic_write(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))


def _summary_table(runs: Sequence[Run], share: float) -> str:
    rows = [summary(run, share) for run in runs]
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("run", *rows[0]))
    body = "".join(
        f"<tr>{_run_heading(i, run, 'row')}{_cells(row.values())}</tr>"
        for i, (run, row) in enumerate(zip(runs, rows, strict=True))
    )
    return _table("Losses in nats per token", head, body)


def _settings(runs: Sequence[Run]) -> str:
    """The settings that differ; those of a single run all, folded."""
    without = [run.name for run in runs if not run.settings]
    note = ""
    if without:
        names = escape(", ".join(without))
        note = f"<p>No settings known of {names}: no config.yaml that can be read.</p>"
    if len(runs) == 1:
        settings = runs[0].settings
        body = "".join(_setting_row(name, [shown(settings, name)]) for name in settings)
        table = _table("", "<th scope=col>setting</th><th scope=col>value</th>", body)
        return note or f"<details><summary>Settings</summary>{table}</details>"
    differing = differing_settings(runs)
    if not differing:
        return note or "<p>The settings of the runs are the same.</p>"
    head = "<th scope=col>setting</th>"
    head += "".join(_run_heading(i, run, "col") for i, run in enumerate(runs))
    body = "".join(_setting_row(name, values) for name, values in differing.items())
    return _table("Settings that differ", head, body) + note


def _table(caption: str, head: str, body: str) -> str:
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f"<div class=scroll><table>{caption}<thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _run_heading(index: int, run: Run, scope: str) -> str:
    return (
        f"<th scope={scope}><svg class=swatch data-run={index} width=24 height=4></svg> "
        f"{escape(run.name)}</th>"
    )


def _setting_row(name: str, values: Sequence[str]) -> str:
    return f"<tr><th scope=row>{escape(name)}</th>{_cells(values)}</tr>"


def _cells(values: Any) -> str:
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def _data(runs: Sequence[Run], x: Axis, share: float) -> dict[str, Any]:
    """All that the page's script draws; report_page.html says what it does with it."""
    shown_panels = panels(runs)
    return {
        "x": x,
        "share": share,
        "axes": {
            axis: dict(zip(("label", "unit"), axis_unit(runs, axis), strict=True))
            for axis in ("step", "tokens", "seconds")
        },
        "panels": [
            {
                "column": p.column,
                "title": p.title,
                "unit": p.unit,
                "isLoss": p.is_loss,
                "isNoisy": p.is_noisy,
                "fromZero": p.from_zero,
            }
            for p in shown_panels
        ],
        "layerPanels": [
            {"columns": p.columns, "title": p.title, "unit": p.unit, "isNoisy": p.is_noisy}
            for p in LAYER_PANELS
        ],
        "runs": [
            {
                "name": run.name,
                "along": _along(run),
                "curves": {
                    p.column: _curve(run.metrics, p.column, MAX_POINTS, p.is_noisy)
                    for p in shown_panels
                },
                "layers": [
                    {
                        column: _curve(layer, column, LAYER_POINTS, p.is_noisy)
                        for p in LAYER_PANELS
                        for column in p.columns
                    }
                    for layer in run.layers
                ],
            }
            for run in runs
        ],
    }


def _along(run: Run) -> dict[str, list[float]]:
    """Tokens and seconds at so many steps that straight lines between them are close enough."""
    steps = np.unique(run.metrics.get("step", np.empty(0)))
    if len(steps) > MAX_POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, MAX_POINTS).astype(int)]
    found = {}
    for axis in ("step", "tokens", "seconds"):
        values = run.along(axis, steps)
        found[axis] = _numbers(values, digits=9) if np.isfinite(values).all() else []
    return found


def _curve(columns: Columns, name: str, at_most: int, is_noisy: bool) -> dict[str, list[float]]:
    """x, y: points to draw, x in steps.  meanX, meanY: what to smooth where that is not them."""
    x, y = finite(columns, name)
    thin_x, thin_y = thinned(x, y, at_most)
    curve = {"x": _numbers(thin_x, digits=9), "y": _numbers(thin_y)}
    if is_noisy and len(thin_x) < len(x):
        mean_x, mean_y = group_means(x, y, at_most)
        curve |= {"meanX": _numbers(mean_x, digits=9), "meanY": _numbers(mean_y)}
    return curve


def _numbers(values: np.ndarray, digits: int = 5) -> list[float]:
    """Short ones, to keep the page small: whole numbers without a point."""
    short = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(value) if value.is_integer() else value for value in short]


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a <script>: no text in it can end that."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
