"""What a run tells about itself: on the terminal, in files, and to TensorBoard and wandb.

    log = RunLog(run_folder, total_steps=2000)
    log.start(arguments, "256 ctx256 L4 D256")
    log.validation({"step": 100, "val_loss": 2.4})   # before the step of the same number
    log.step({"step": 100, "epoch": 0, "tokens": 409600, "loss": 2.3, ...})
    log.close()

Every line reaches the file in one write, so a process that is killed leaves whole lines; should the
system die in the middle of one, the next start drops that half.
"""

from __future__ import annotations

import io
import math
import re
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from rwkvtune.errors import UserError, discard_rest
from rwkvtune.files import atomic_write

if TYPE_CHECKING:
    from rich.live import Live

COLUMNS = (
    "step", "epoch", "tokens", "loss", "val_loss", "val_perplexity", "val_bits_per_byte",
    "lr", "weight_decay", "grad_norm", "tokens_per_s", "seconds",
)  # fmt: skip
"""Columns of metrics.csv. Losses in nats per token; tokens since the first step, of all ranks;
seconds of training. Empty where a step has no value."""

METRICS_NEED = ("step", "loss")
"""By these columns a metrics.csv is told from other files."""

PER_SOURCE = "val_loss/"
"""How the columns begin that a run with several sources of validation data adds behind val_loss."""

LAYER_COLUMNS = (
    "step", "layer", "att_grad_norm", "ffn_grad_norm", "decay_min", "decay_mean", "decay_max",
)  # fmt: skip
"""Columns of layers.csv: a row per block of each step on the cadence. Norms before clipping; what
they and the decays are is said by `layer_stats.layer_statistics`."""

LAYERS_NEED = ("step", "layer")

Row = Mapping[str, float | None]
"""Values of one step by column name; "step" is always there, other columns may be missing."""

SPEED_OVER_STEPS = 200
"""The time left is reckoned from so many latest steps, validation and saving included."""

REFRESH_S = 0.1


class RunLog:
    """The only place that a run writes to or prints from; on ranks other than zero it does nothing.

    total_steps: the step number at which training ends.
    log_every: steps from one logged step to the next. The last step, and those with a validation,
    are always logged.
    extra_columns: what metrics.csv holds besides COLUMNS: validation losses per source,
    val_loss/NAME.
    wandb_project: "" = no wandb. Its files lie below the run folder; with WANDB_MODE=offline in the
    environment they stay there.
    UserError when an option needs a package that is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_steps: int,
        log_every: int = 1,
        extra_columns: Sequence[str] = (),
        is_rank_zero: bool = True,
        tensorboard: bool = False,
        wandb_project: str = "",
        stream: TextIO | None = None,
    ) -> None:
        if log_every < 1:
            raise UserError(f"log_every is {log_every}: give the number of steps, 1 or more")
        for name in extra_columns:
            if not name.startswith(PER_SOURCE) or set(name) & set(',"') or not name.isprintable():
                raise UserError(
                    f"{name!r} cannot be a column of metrics.csv: expected {PER_SOURCE}NAME, where "
                    "NAME has no comma, quote or control character"
                )
        after_val_loss = COLUMNS.index("val_loss") + 1
        self.columns = (*COLUMNS[:after_val_loss], *extra_columns, *COLUMNS[after_val_loss:])
        self.folder = Path(folder)
        self.total_steps, self.log_every = total_steps, log_every
        self.is_active = is_rank_zero
        self._console = Console(stream or sys.stdout)
        self._trackers: list[TensorBoard | Wandb] = []
        if is_rank_zero and tensorboard:
            self._trackers.append(TensorBoard(self.folder / "tensorboard"))
        if is_rank_zero and wandb_project:
            self._trackers.append(Wandb(self.folder, wandb_project))
        self._validated: dict[str, float | None] = {}
        self._val_loss: float | None = None
        self._losses: list[float] = []
        """Since the latest line of the console."""
        self._times: deque[tuple[int, float]] = deque(maxlen=SPEED_OVER_STEPS + 1)

    def start(
        self, arguments: Mapping[str, Any], run_name: str, *, step: int = 0, epoch: int = 0
    ) -> None:
        """Open the files, first dropping what a lost part of the run wrote beyond its last save.

        step: steps done so far.  epoch: the number that the next epoch line will have. After a
        resume the files so read as if the run had never stopped; a run from the beginning in a used
        folder leaves of its predecessor the headers in train_log.txt.
        run_name: for wandb; the time is added to it.
        """
        if not self.is_active:
            return
        timestamp = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        for tracker in self._trackers:  # first: they may refuse
            tracker.start(arguments, f"{run_name} {timestamp}", step)
        self._metrics = StepTable(
            self.folder / "metrics.csv", self.columns, needed=METRICS_NEED, last_step=step
        )
        self._layers: StepTable | None = None
        if (self.folder / "layers.csv").exists():
            self._layers = self._layer_table(last_step=step)
        self._train_log = TrainLogFile(self.folder / "train_log.txt", next_epoch=epoch)
        self._train_log.begin_run(timestamp, arguments)
        for tracker in self._trackers:
            if isinstance(tracker, Wandb):
                tracker.replay(self._logged_so_far())
        self._times.append((step, time.monotonic()))

    def is_logged(self, step: int) -> bool:
        """True when `step(row)` would write the row of this step; others need no loss value."""
        if not self.is_active:
            return False
        return self.is_on_cadence(step) or self._validated.get("step") == step

    def is_on_cadence(self, step: int) -> bool:
        """True, on every rank alike, for each log_every-th step and the last one."""
        return step % self.log_every == 0 or step >= self.total_steps

    def layers(self, step: int, blocks: Sequence[Row]) -> None:
        """Report what each block did in `step`, first to last: columns of LAYER_COLUMNS but step
        and layer. Call it before `step` of that number."""
        if not self.is_active or not blocks:
            return
        if self._layers is None:
            self._layers = self._layer_table(last_step=step)
        rows = [{"step": step, "layer": layer, **block} for layer, block in enumerate(blocks)]
        self._layers.append(*rows)
        for tracker in self._trackers:
            tracker.record({"step": step, **_by_layer(blocks)})

    def step(self, row: Row) -> None:
        """Report an optimizer step, together with a validation of the same step.

        The files get the loss of this step, the console the mean over the steps since its last
        line: one step's loss is mostly noise.
        """
        if not self.is_active:
            return
        step = int(row["step"] or 0)
        is_logged = self.is_logged(step)
        if self._validated.get("step") == step:
            row, self._validated = {**row, **self._validated}, {}
        self._times.append((step, time.monotonic()))
        if is_logged:
            self._record(row)
        if (loss := row.get("loss")) is not None:
            self._losses.append(loss)
            row = {**row, "loss": sum(self._losses) / len(self._losses)}
        self._console.progress(
            step, self.total_steps, self._fields(row), self._time_left(step), is_logged
        )
        if is_logged:
            self._losses.clear()

    def validation(self, row: Row) -> None:
        """Report step, val_loss, val_perplexity, val_bits_per_byte, extra columns; call it before
        `step` of that number. One that no step follows gets a row of its own."""
        if not self.is_active:
            return
        self._record_unclaimed_validation()
        self._validated = dict(row)
        self._val_loss = row["val_loss"]
        text = f"step {row['step']}/{self.total_steps}  validation loss {row['val_loss']:.4f}"
        if (perplexity := row.get("val_perplexity")) is not None:
            text += f"  perplexity {perplexity:.2f}"
        if (bits := row.get("val_bits_per_byte")) is not None:
            text += f"  {bits:.4f} bits per byte"
        for name, value in row.items():
            if name.startswith(PER_SOURCE) and value is not None:
                text += f"  {name.removeprefix(PER_SOURCE)} {value:.4f}"
        self.line(text)
        if not row["step"]:  # before the first step
            self._record_unclaimed_validation()

    def epoch(self, epoch: int, mean_loss: float, lr: float, epoch_of_this_run: int) -> None:
        """Write the published line about a finished (mini-)epoch; mean_loss in nats per token."""
        if not self.is_active:
            return
        self._train_log.end_epoch(epoch, mean_loss, lr, epoch_of_this_run)
        self.line(f"epoch {epoch} done  mean loss {mean_loss:.4f}")

    def line(self, text: str) -> None:
        """Print a line; on a terminal it appears above the progress bar."""
        if self.is_active:
            self._console.line(text)

    def table(self, rows: Iterable[tuple[str, object]]) -> None:
        """Print names and values in two aligned columns."""
        if self.is_active:
            self._console.table([(name, str(value)) for name, value in rows])

    def sample(self, text: str, step: int) -> None:
        """Show text that the model wrote after `step` steps."""
        if not self.is_active:
            return
        for tracker in self._trackers:
            tracker.sample(text, step)
        indented = "\n".join(f"  | {part}" for part in without_controls(text).split("\n"))
        self.line(f"sample at step {step}:\n{indented}")

    def close(self) -> None:
        """Take the bar away and close everything; harmless when repeated."""
        if not self.is_active:
            return
        self._record_unclaimed_validation()
        self._console.close()
        while self._trackers:
            self._trackers.pop().close()

    def _layer_table(self, *, last_step: int) -> StepTable:
        path = self.folder / "layers.csv"
        return StepTable(path, LAYER_COLUMNS, needed=LAYERS_NEED, last_step=last_step)

    def _logged_so_far(self) -> list[Row]:
        """What trackers have been given up to here, one row per step, read from the files."""
        by_step: dict[float, dict[str, float | None]] = {}
        blocks: dict[float, list[Row]] = {}
        for name, needed in (("metrics.csv", METRICS_NEED), ("layers.csv", LAYERS_NEED)):
            for row in read_table(self.folder / name, needed=needed):
                there = {k: v for k, v in row.values.items() if not math.isnan(v)}
                step = there.pop("step")
                if "layer" in there:
                    del there["layer"]
                    blocks.setdefault(step, []).append(there)
                else:
                    by_step.setdefault(step, {"step": step}).update(there)
        for step, rows in blocks.items():
            by_step.setdefault(step, {"step": step}).update(_by_layer(rows))
        return [by_step[step] for step in sorted(by_step)]

    def _record(self, row: Row) -> None:
        self._metrics.append(row)
        for tracker in self._trackers:
            tracker.record(row)

    def _record_unclaimed_validation(self) -> None:
        if self._validated:
            self._record(self._validated)
            self._validated = {}

    def _time_left(self, step: int) -> float:
        """Seconds to the last step at the pace of the latest ones."""
        first_step, first_time = self._times[0]
        passed = time.monotonic() - first_time
        return max(self.total_steps - step, 0) * passed / max(step - first_step, 1)

    def _fields(self, row: Row) -> str:
        """The numbers of a step as the terminal and the plain lines show them."""
        fields = [
            ("epoch {:.0f}", row.get("epoch")),
            ("loss {:.4f}", row.get("loss")),
            ("val {:.4f}", self._val_loss),
            ("lr {:.2e}", row.get("lr")),
            ("norm {:.2f}", row.get("grad_norm")),
        ]
        texts = [form.format(value) for form, value in fields if value is not None]
        if (speed := row.get("tokens_per_s")) is not None:
            texts.append(f"{short_number(speed)} tokens/s")
        return "  ".join(texts)


class StepTable:
    """A CSV file of numbers with a row per logged step, such as metrics.csv.

    Opening it drops rows after `last_step` and any that are damaged. An older file gets the columns
    that it lacks, and keeps behind them those that nobody writes any more. UserError when the file
    lacks a column of `needed`.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], *, needed: Sequence[str], last_step: int
    ) -> None:
        try:
            rows = read_table(path, needed=needed)
        except UserError as error:
            raise UserError(f"{error}. Move the file away or choose another folder") from error
        known_before = rows[0].text if rows else {}
        self.path = path
        self.columns = (*columns, *(name for name in known_before if name not in columns))
        kept = [_csv_line(self.columns)]
        for row in rows:
            if row.values["step"] <= last_step:
                kept.append(_csv_line([row.text.get(name, "") for name in self.columns]))
        content = "".join(kept).encode()
        if not path.exists() or path.read_bytes() != content:
            atomic_write(path, lambda file: file.write(content))

    def append(self, *rows: Row) -> None:
        """Add rows in one write."""
        lines = []
        for row in rows:
            unknown = set(row) - set(self.columns)
            assert not unknown, f"{self.path.name} has no columns {unknown}"
            lines.append(_csv_line([_csv_value(name, row.get(name)) for name in self.columns]))
        _append(self.path, "".join(lines))


class TrainLogFile:
    """train_log.txt in the published format (RWKV-LM, src/trainer.py).

    Opening it drops the lines of epochs from `next_epoch` on, and a last line that was cut short;
    all other lines stay byte for byte.
    """

    EPOCH_LINE = re.compile(rb"(\d+) \S+ \S+ \S+ \d{4}-\d\d-\d\d \S+ \d+\s*")

    def __init__(self, path: Path, *, next_epoch: int) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        kept = b"".join(
            line + b"\n"
            for line in content.split(b"\n")[:-1]
            if not ((found := self.EPOCH_LINE.fullmatch(line)) and int(found[1]) >= next_epoch)
        )
        if kept != content:
            atomic_write(path, lambda file: file.write(kept))

    def begin_run(self, timestamp: str, arguments: Mapping[str, Any]) -> None:
        on_one_line = str(dict(arguments)).replace("\n", " ")
        _append(self.path, f"NEW RUN {timestamp}\n{on_one_line}\n")

    def end_epoch(self, epoch: int, mean_loss: float, lr: float, epoch_of_this_run: int) -> None:
        perplexity = _exp(mean_loss)
        _append(
            self.path,
            f"{epoch} {mean_loss:.6f} {perplexity:.4f} {lr:.8f} {datetime.now()} "
            f"{epoch_of_this_run}\n",
        )


class TableRow(NamedTuple):
    values: dict[str, float]
    """By column name; nan where the cell is empty."""
    text: dict[str, str]
    """The cells as they stand in the file, by column name."""


def read_metrics(path: str | Path) -> list[TableRow]:
    """The whole rows of a metrics.csv in the file's order, with whatever columns it has; none when
    there is no such file. UserError when the file is something else."""
    return read_table(path, needed=METRICS_NEED)


def read_table(path: str | Path, *, needed: Sequence[str]) -> list[TableRow]:
    """The whole rows of a CSV file of numbers; none when there is no such file.

    A row that was cut short or damaged is left out. UserError when the header lacks a column of
    `needed`.
    """
    header, rows = _whole_rows(Path(path), needed)
    return [
        TableRow(dict(zip(header, values, strict=True)), dict(zip(header, cells, strict=True)))
        for cells, values in rows
    ]


def read_columns(path: str | Path, *, needed: Sequence[str]) -> dict[str, array[float]]:
    """The same as `read_table` by columns, for files of a million rows: 8 bytes a cell, nan where
    it is empty."""
    header, rows = _whole_rows(Path(path), needed)
    columns = [array("d") for _ in header]
    for _, values in rows:
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return dict(zip(header, columns, strict=True))


def _whole_rows(
    path: Path, needed: Sequence[str]
) -> tuple[list[str], Iterator[tuple[list[str], list[float]]]]:
    """(names of the columns, cells and values of each row that is whole)."""
    if not path.exists():
        return [], iter(())
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    lines = content.decode("utf-8", "replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    header = lines[0].strip().split(",") if lines else []
    if lines and not set(needed) <= set(header):
        raise UserError(
            f"{path} holds no training metrics: its first line has to name the columns "
            f"{' and '.join(needed)}, it is {lines[0].strip()[:80]!r}"
        )
    return header, _parsed(header, lines[1:])


def _parsed(header: list[str], lines: list[str]) -> Iterator[tuple[list[str], list[float]]]:
    step = header.index("step") if lines else 0
    for line in lines:
        cells = line.strip().split(",")
        if len(cells) != len(header):
            continue
        try:
            values = [float(cell) if cell else math.nan for cell in cells]
        except ValueError:
            continue
        if math.isfinite(values[step]):
            yield cells, values


class Console:
    """Prints lines; on a terminal also a progress bar below them (two lines: bar, numbers)."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._live: Live | None = None
        self._drawn_at = -math.inf
        self._rich: Any = None
        if stream.isatty():
            from rich.console import Console as RichConsole

            class VisibleCursor(RichConsole):
                """rich hides the cursor while a bar is shown; kill -9 would leave it hidden."""

                def show_cursor(self, show: bool = True) -> bool:
                    return False

            rich = VisibleCursor(file=stream, highlight=False, markup=False, emoji=False)
            self._rich = None if rich.is_dumb_terminal else rich

    def line(self, text: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self._rich:
            self._rich.print(text, soft_wrap=True)
            return
        try:
            print(text, file=self.stream, flush=True)
        except BrokenPipeError:  # the reader has left (`| head`): save, and stop
            discard_rest(self.stream)
            signal.raise_signal(signal.SIGTERM)

    def table(self, rows: list[tuple[str, str]]) -> None:
        if not self._rich:
            width = max((len(name) for name, _ in rows), default=0)
            self.line("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
            return
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        for name, value in rows:
            grid.add_row(Text(name), Text(value))
        self._rich.print(grid)

    def progress(
        self, step: int, total: int, fields: str, seconds_left: float, is_logged: bool
    ) -> None:
        count = f"step {step:>{len(str(total))}}/{total}"
        time_left = f"time left {duration(seconds_left)}"
        if not self._rich:
            if is_logged:
                self.line("  ".join(part for part in (count, fields, time_left) if part))
            return
        now = time.monotonic()
        if now - self._drawn_at >= REFRESH_S or step >= total:
            self._drawn_at = now
            self._draw(count, step / max(total, 1), fields, time_left)

    def _draw(self, count: str, share: float, fields: str, time_left: str) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True)
        bar.add_row(
            count, ProgressBar(total=1.0, completed=share), f"{100 * share:.0f}%", time_left
        )
        picture = Group(bar, Text(fields, no_wrap=True, overflow="ellipsis"))
        if self._live is None:
            # No thread of its own: the training loop draws, between two steps.
            self._live = Live(console=self._rich, auto_refresh=False)
            self._live.start()
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class TensorBoard:
    """Scalars under <run folder>/tensorboard; at a resume the lost steps are purged."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(_missing("tensorboard", error)) from error
        self._make, self.folder = SummaryWriter, folder
        self._writer: Any = None

    def start(self, arguments: Mapping[str, Any], name: str, step: int) -> None:
        self._writer = self._make(str(self.folder), purge_step=step + 1)
        table = "\n".join(f"| {key} | `{value}` |" for key, value in arguments.items())
        self._writer.add_text("arguments", f"| name | value |\n| --- | --- |\n{table}", step)

    def record(self, row: Row) -> None:
        step = int(row["step"] or 0)
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def sample(self, text: str, step: int) -> None:
        self._writer.add_text("sample", f"```\n{text}\n```", step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A wandb run with the published names: loss, lr, wd, Gtokens, kt/s; ours are added to them.

    Each start is a run of its own in one group: wandb cannot go on with an offline run, and one
    that is killed loses its latest rows. So `replay` first gives it all that was logged before.
    """

    PUBLISHED = {"weight_decay": "wd", "tokens": "Gtokens", "tokens_per_s": "kt/s"}
    UNITS = {"tokens": 1e9, "tokens_per_s": 1e3}

    def __init__(self, folder: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(_missing("wandb", error)) from error
        self._wandb, self.folder, self.project = wandb, folder, project
        self._run: Any = None

    def start(self, arguments: Mapping[str, Any], name: str, step: int) -> None:
        settings = self._wandb.Settings(save_code=False)
        try:
            self._run = self._wandb.init(
                project=self.project,
                name=name,
                group=str(self.folder),
                config=dict(arguments),
                dir=self.folder,
                settings=settings,
            )
        except self._wandb.Error as error:
            reason = str(error).rstrip(".")
            raise UserError(
                f"wandb cannot start: {reason}. Log in with `wandb login`, set WANDB_MODE=offline "
                "to log without a network, or leave --wandb out."
            ) from error

    def replay(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.record(row)

    def record(self, row: Row) -> None:
        values = {
            self.PUBLISHED.get(name, name): value / self.UNITS.get(name, 1)
            for name, value in row.items()
            if name != "step" and value is not None
        }
        self._run.log(values, step=int(row["step"] or 0))

    def sample(self, text: str, step: int) -> None:
        self._run.log({"sample": self._wandb.Html(_preformatted(text))}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _missing(package: str, error: ImportError) -> str:
    return (
        f"--{package} needs the package {package}, which cannot be imported ({error}); "
        f"install it with: pip install 'rwkvtune[{package}]', or leave the option out"
    )


def _append(path: Path, text: str) -> None:
    """Add whole lines to a file: all of them or, when the disk is full, none."""
    data = text.encode("utf-8", "backslashreplace")
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, io.SEEK_END)
            if file.write(data) != len(data):
                file.truncate(size)
                raise OSError("no space left on the disk")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Make room, then run the same command "
            "again: it continues from the last save."
        ) from error


def _csv_line(cells: Iterable[str]) -> str:
    return ",".join(cells) + "\n"


def _csv_value(name: str, value: float | None) -> str:
    """Losses, rates and norms keep every digit, so that two runs can be compared exactly."""
    if value is None:
        return ""
    if name in ("step", "epoch", "tokens", "layer"):
        return str(int(value))
    if name in ("tokens_per_s", "seconds"):
        return f"{value:.3f}"
    if name in LAYER_COLUMNS:  # many rows, and nobody compares them to the last bit
        return f"{value:.6g}"
    return repr(float(value))


def _by_layer(blocks: Sequence[Row]) -> dict[str, float | None]:
    """One flat mapping of names such as layers/03/att_grad_norm, which sort by depth."""
    width = max(2, len(str(len(blocks) - 1)))
    return {
        f"layers/{layer:0{width}}/{name}": value
        for layer, block in enumerate(blocks)
        for name, value in block.items()
    }


def _exp(x: float) -> float:
    """e^x, infinite where a float ends: a diverged loss has to be logged too."""
    return math.exp(x) if x < 709 else x * math.inf


def without_controls(text: str) -> str:
    """What an early model writes may hold control characters, which would upset a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def short_number(value: float) -> str:
    """24100 -> 24.1k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """92 -> 1:32, 3723 -> 1:02:03, two days and more -> 2d 01:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def _preformatted(text: str) -> str:
    from html import escape

    return f"<pre>{escape(text)}</pre>"
