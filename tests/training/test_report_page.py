"""The HTML page, read by the standard library's parser and opened in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkvtune.training.report import COLOURS, write_report
from rwkvtune.training.report_data import MAX_POINTS, smoothed
from rwkvtune.training.report_page import TEMPLATE
from tests.training.report_runs import SOURCES, loss_at, write_run

HOSTILE = "val_loss/</script <!-- <script b"
"""A column whose name would end or swallow a script that it stands in."""
VOID = {"meta", "img", "input", "br", "link"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes, text and whether all is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script is given."""
        found: dict[str, Any] = json.loads(self.texts["script"][0])
        return found


def test_the_page_is_whole_and_names_no_address(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, sources=SOURCES) for name in "ab"]
    png, html = write_report(runs, tmp_path / "report")
    page = Page(html)
    assert page.open == [] and len(page.texts["script"]) == 2
    assert "//" not in re.sub(r"^\s*//.*$", "", TEMPLATE.read_text(), flags=re.M)
    text = html.read_text()
    assert not re.search(r"https?:|\bimport\b|fetch\(|XMLHttp|url\((?!#)|@font", text)
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action"} & set(attributes)
        if (source := attributes.get("src")) is not None:
            assert (
                base64.b64decode(source.removeprefix("data:image/png;base64,")) == png.read_bytes()
            )
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    for i, colour in enumerate(COLOURS):
        assert f"--run{i}: {colour};" in text


def test_names_and_settings_cannot_become_html_or_script(tmp_path: Path) -> None:
    names = ["<script>alert(1)<", "{{data}} & \"'", "</td>\u2028"]
    settings = "sample_prompt: '</script><img src=x onerror=alert(1)>'\nproj_dir: x\n"
    runs = [
        write_run(tmp_path / name.replace("/", "\u2044"), settings=settings, sources=(HOSTILE,))
        for name in names
    ]
    settings = "sample_prompt: other\n"
    runs.append(write_run(tmp_path / "plain", settings=settings))
    _, html = write_report(runs, tmp_path / "report")
    page = Page(html)
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert [run["name"] for run in page.data["runs"]] == [run.name for run in runs]
    assert "<" not in page.texts["script"][0]
    assert page.data["panels"][2]["title"] == "Validation loss: </script <!-- <script b"
    assert "</script><img src=x onerror=alert(1)>" in page.texts["td"]
    assert {f" {run.name}" for run in runs} <= set(page.texts["th"])


def test_the_tables_hold_the_summary_and_the_settings_that_differ(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", settings="lr_init: 0.001\nn_layer: 2\n")
    b = write_run(tmp_path / "b", settings="lr_init: 0.003\nn_layer: 2\n")
    cells = Page(write_report([a, b], tmp_path / "both")[1]).texts["td"]
    assert cells[-2:] == ["0.001", "0.003"] and cells.count("2.5250") == 2
    alone = Page(write_report([a])[1])
    assert "Settings" in alone.texts["summary"] and alone.texts["td"][-2:] == ["0.001", "2"]


def test_a_long_run_gives_a_small_page_with_its_extremes(tmp_path: Path) -> None:
    steps = 30_000
    rows = [f"{i},{i},{10 + (i * 7919 % 1000) / 1000!r}\n" for i in range(1, steps + 1)]
    rows[12345] = "12346,12346,999.5\n"
    (tmp_path / "metrics.csv").write_text("step,tokens,loss\n" + "".join(rows))
    _, html = write_report([tmp_path])
    run = Page(html).data["runs"][0]
    curve = run["curves"]["loss"]
    assert len(curve["x"]) <= MAX_POINTS and len(run["along"]["step"]) <= MAX_POINTS
    assert curve["y"][curve["x"].index(12346)] == 999.5
    assert (curve["x"][0], curve["x"][-1]) == (1, steps)
    assert np.mean(curve["meanY"]) == pytest.approx(10.5 + 989 / steps, abs=0.01)
    assert html.stat().st_size < 500_000


def test_numbers_that_are_none_stay_out_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,lr\n1,nan,\n2,inf,1e-3\n3,1.25,0.0005\n")
    run = Page(write_report([tmp_path], say=lambda line: None)[1]).data["runs"][0]
    assert run["curves"]["loss"] == {"x": [3], "y": [1.25]}
    assert run["curves"]["lr"] == {"x": [2, 3], "y": [0.001, 0.0005]}
    assert run["along"]["tokens"] == []


IN_THE_PAGE = """
<script>
const at = (svg, type, across, down) => {
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent(type, {
    clientX: box.left + across * box.width, clientY: box.top + down * box.height }));
};
const svgs = () => [...document.querySelectorAll("figure svg")];
const shown = () => [...document.querySelectorAll(".tip")].filter(t => !t.hidden).map(t =>
  [...t.children].map(row => row.textContent));
const found = {};
found.figures = svgs().length;
found.curves = svgs().map(svg => svg.querySelectorAll("path.curve:not(.raw)").length);
const curve = data.runs[0].curves.loss;
found.smoothed = smoothed(curve.x, curve.y, 0.2);
byId("share").value = 0;
byId("share").dispatchEvent(new Event("input"));
found.raw = document.querySelectorAll("path.raw").length;
at(svgs()[0], "pointermove", 0.5, 0.5);
found.tip = shown();
byId("axis").value = "tokens";
byId("axis").dispatchEvent(new Event("change"));
found.tokens = data.runs[0].along.tokens.length && along(data.runs[0], [1.5]);
const boxes = document.querySelectorAll("#legend input");
boxes[1].click();
found.afterHiding = svgs().map(svg => svg.querySelectorAll("path.curve").length);
byId("log").click();
byId("theme").click();
dispatchEvent(new Event("beforeprint"));
dispatchEvent(new Event("afterprint"));
found.dark = document.documentElement.dataset.theme;
found.isWide = document.documentElement.scrollWidth > innerWidth;
found.requests = performance.getEntriesByType("resource").length;
document.body.innerHTML = "";
document.title = JSON.stringify(found);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")
@pytest.mark.parametrize("width", [1400, 390])
def test_in_a_browser_the_page_draws_reads_out_and_asks_for_nothing(
    width: int, tmp_path: Path
) -> None:
    runs = [
        write_run(tmp_path / "first", sources=(SOURCES[0], HOSTILE), layers=3),
        write_run(tmp_path / "second", steps=20, sources=(SOURCES[0], HOSTILE), layers=2),
    ]
    _, html = write_report(runs, tmp_path / "report")
    html.write_text(html.read_text().replace("</body>", IN_THE_PAGE + "</body>"))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},1000",
            "--virtual-time-budget=1000", "--dump-dom", html.as_uri(),
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(title_of(done.stdout))
    # Seven panels of metrics, and per run three of layers; the last of these has three per layer.
    assert found["figures"] == 7 + 2 * 3
    assert found["curves"] == [2] * 7 + [3, 3, 9] + [2, 2, 6]
    steps = np.arange(1.0, 41.0)
    losses = np.array([loss_at(step) for step in range(1, 41)])
    assert found["smoothed"] == pytest.approx(smoothed(steps, losses, 0.2), abs=1e-4)
    assert found["raw"] == 0
    ((heading, *values),) = found["tip"]
    step = int(heading.removeprefix("optimizer step "))
    assert 10 < step < 30
    assert values[0] == f"first {float(f'{loss_at(step):.5g}'):.5g}"
    assert values[1].startswith("second ")
    assert found["tokens"] == [768.0]
    assert found["afterHiding"] == [1] * 7 + [3, 3, 9]
    assert found["dark"] == "dark" and not found["isWide"] and found["requests"] == 0


def title_of(dom: str) -> str:
    from html import unescape

    title = re.search(r"<title>(.*?)</title>", dom, flags=re.S)
    assert title, dom[:500]
    return unescape(title[1])
