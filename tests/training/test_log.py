"""What a run leaves on the terminal and in files, read back with other readers than its own."""

from __future__ import annotations

import csv
import io
import math
import re
import resource
import signal
import struct
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rwkvtune.errors import UserError
from rwkvtune.training.log import RunLog, _by_layer, duration, read_metrics, short_number

HEADER = (
    "step,epoch,tokens,loss,val_loss,val_perplexity,val_bits_per_byte,"
    "lr,weight_decay,grad_norm,tokens_per_s,seconds"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def loss_at(step: int) -> float:
    return 5 / (1 + step / 7)


def row(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        "epoch": (step - 1) // 4,
        "tokens": step * 8192,
        "loss": loss_at(step),
        "lr": 1.2e-3,
        "weight_decay": 0.1,
        "grad_norm": 0.41234,
        "tokens_per_s": 24100.0,
        "seconds": step / 3,
    }


def train(folder: Path, first: int, last: int, *, first_epoch: int, total: int = 12) -> None:
    """What the loop reports of steps first..last: epochs of 4 steps, validation every 3."""
    log = RunLog(folder, total_steps=total, log_every=2, stream=io.StringIO())
    log.start({"n_layer": 4}, "name", step=first - 1, epoch=first_epoch)
    for step in range(first, last + 1):
        if step % 3 == 0:
            log.validation({"step": step, "val_loss": loss_at(step) + 0.1})
        if step % 2 == 0:
            log.layers(step, [{"att_grad_norm": step / 3, "decay_max": 0.99}, {"decay_min": 0.6}])
        log.step(row(step))
        if step % 4 == 0:
            epoch = step // 4 - 1
            log.epoch(epoch, loss_at(step), 1.2e-3, epoch - first_epoch)


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def epoch_lines(folder: Path) -> list[list[str]]:
    """The fields of train_log.txt's epoch lines, without the time and the epoch of this run."""
    lines = (folder / "train_log.txt").read_text().splitlines()
    return [line.split()[:4] for line in lines if line[0].isdigit()]


def test_train_log_has_the_published_format(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total_steps=10, stream=io.StringIO())
    log.start({"n_layer": 12, "proj_dir": "a\nb"}, "name")
    log.epoch(0, 4.875856, 5.9e-4, 0)
    header, arguments, line = (tmp_path / "train_log.txt").read_text().splitlines()
    assert re.fullmatch(r"NEW RUN \d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", header)
    assert eval(arguments) == {"n_layer": 12, "proj_dir": "a\nb"}
    # epoch, mean loss, its exponential (e^4.875856 = 131.0863...), learning rate, time, epoch
    fields = line.split(" ")
    assert fields[:4] + fields[6:] == [
        "0",
        "4.875856",
        f"{math.e**4.875856:.4f}",
        "0.00059000",
        "0",
    ]
    datetime.strptime(" ".join(fields[4:6]), "%Y-%m-%d %H:%M:%S.%f")


def test_a_diverged_epoch_is_logged_too(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total_steps=10, stream=io.StringIO())
    log.start({}, "name")
    log.epoch(0, 1e4, 1e-3, 0)
    log.epoch(1, math.nan, 1e-3, 1)
    assert [line[2] for line in epoch_lines(tmp_path)] == ["inf", "nan"]


def test_metrics_hold_every_logged_step_once_with_every_digit_of_the_loss(tmp_path: Path) -> None:
    train(tmp_path, 1, 11, first_epoch=0, total=11)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == HEADER
    found = metrics(tmp_path)
    # Every second step, those with a validation, and the last.
    assert [int(r["step"]) for r in found] == [2, 3, 4, 6, 8, 9, 10, 11]
    assert [float(r["loss"]) for r in found] == [loss_at(int(r["step"])) for r in found]
    validated = {int(r["step"]): float(r["val_loss"]) for r in found if r["val_loss"]}
    assert validated == {step: loss_at(step) + 0.1 for step in (3, 6, 9)}
    assert found[0]["tokens"] == "16384" and found[0]["val_perplexity"] == ""


def test_a_validation_without_a_step_gets_a_row_of_its_own(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total_steps=10, stream=io.StringIO())
    log.start({}, "name")
    log.validation({"step": 0, "val_loss": 5.5})
    log.step(row(1))
    log.step(row(2))
    log.validation({"step": 2, "val_loss": 4.5})
    log.close()
    log.close()
    found = [(r["step"], r["loss"] != "", r["val_loss"]) for r in metrics(tmp_path)]
    assert found == [("0", False, "5.5"), ("1", True, ""), ("2", True, ""), ("2", False, "4.5")]


def test_validation_per_source_has_columns_of_its_own_which_an_older_file_gets(
    tmp_path: Path,
) -> None:
    train(tmp_path, 1, 6, first_epoch=0)
    before = metrics(tmp_path)
    names = ("val_loss/plays", "val_loss/old poems")
    stream = io.StringIO()
    log = RunLog(tmp_path, total_steps=8, log_every=2, extra_columns=names, stream=stream)
    log.start({}, "name", step=4)
    log.validation({"step": 6, "val_loss": 2.5, names[0]: 2.0, names[1]: 3.0})
    log.step(row(6))
    log.close()
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == HEADER.replace("val_loss,", "val_loss,val_loss/plays,val_loss/old poems,")
    *older, last = metrics(tmp_path)
    assert older == [{**r, **dict.fromkeys(names, "")} for r in before if int(r["step"]) <= 4]
    assert [last[name] for name in ("val_loss", *names)] == ["2.5", "2.0", "3.0"]
    values = [r.values for r in read_metrics(tmp_path / "metrics.csv")]
    assert values[-1][names[0]] == 2.0 and math.isnan(values[0][names[1]])
    assert "validation loss 2.5000  plays 2.0000  old poems 3.0000\n" in stream.getvalue()

    train(tmp_path, 7, 8, first_epoch=1)  # a run that knows no sources keeps what is there
    assert [r[names[1]] for r in metrics(tmp_path)][-2:] == ["3.0", ""]


@pytest.mark.parametrize("name", ["plays", "val_loss/a,b", "val_loss/a\u2028b", 'val_loss/"'])
def test_a_name_that_would_break_the_csv_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a column of metrics.csv"):
        RunLog(tmp_path, total_steps=8, extra_columns=[name])


@pytest.mark.parametrize("killed_at", [6, 8, 11])
def test_after_a_resume_the_files_read_as_if_the_run_had_never_stopped(
    tmp_path: Path, killed_at: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    train(whole, 1, 12, first_epoch=0)
    train(resumed, 1, killed_at, first_epoch=0)  # the last save was after step 5, in epoch 1
    train(resumed, 6, 12, first_epoch=1)
    for name in ("metrics.csv", "layers.csv"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert epoch_lines(resumed) == epoch_lines(whole)
    text = (resumed / "train_log.txt").read_text()
    assert text.count("NEW RUN") == 2


def test_a_run_that_goes_on_with_more_steps_keeps_all_it_had(tmp_path: Path) -> None:
    train(tmp_path, 1, 12, first_epoch=0)
    before = [(tmp_path / name).read_text() for name in ("metrics.csv", "train_log.txt")]
    train(tmp_path, 13, 16, first_epoch=3, total=16)
    for old, name in zip(before, ("metrics.csv", "train_log.txt"), strict=True):
        assert (tmp_path / name).read_text().startswith(old)
    assert [line[0] for line in epoch_lines(tmp_path)] == ["0", "1", "2", "3"]


def test_layers_have_a_row_each_and_their_names_sort_by_depth(tmp_path: Path) -> None:
    train(tmp_path, 1, 2, first_epoch=0)
    assert (tmp_path / "layers.csv").read_text().splitlines() == [
        "step,layer,att_grad_norm,ffn_grad_norm,decay_min,decay_mean,decay_max",
        "2,0,0.666667,,,,0.99",
        "2,1,,,0.6,,",
    ]
    assert list(_by_layer([{"decay_min": 0.6}] * 2)) == [
        "layers/00/decay_min", "layers/01/decay_min",
    ]  # fmt: skip
    names = list(_by_layer([{"decay_min": 0.6}] * 101))
    assert names == sorted(names) and names[7] == "layers/007/decay_min"


@pytest.mark.parametrize("name", ["metrics.csv", "layers.csv", "train_log.txt"])
def test_a_last_line_that_was_cut_anywhere_is_dropped(tmp_path: Path, name: str) -> None:
    train(tmp_path, 1, 12, first_epoch=0)
    path = tmp_path / name
    content = path.read_bytes()
    for cut in range(1, 60, 7):
        path.write_bytes(content[:-cut])
        RunLog(tmp_path, total_steps=12, stream=io.StringIO()).start({}, "name", step=12, epoch=3)
        whole_lines = content[:-cut][: content[:-cut].rfind(b"\n") + 1]
        assert path.read_bytes().startswith(whole_lines)
        rest = path.read_bytes()[len(whole_lines) :]
        assert rest == b"" if name.endswith(".csv") else rest.startswith(b"NEW RUN ")


def test_rows_damaged_by_a_power_cut_are_dropped(tmp_path: Path) -> None:
    train(tmp_path, 1, 12, first_epoch=0)
    path = tmp_path / "metrics.csv"
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * 40 + b"\n" + b"\xff\xfe,x\n" + b"99\n")
    RunLog(tmp_path, total_steps=12, stream=io.StringIO()).start({}, "name", step=12, epoch=3)
    assert path.read_bytes() == content


def test_a_file_that_holds_no_metrics_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("name,age\nann,7\n")
    log = RunLog(tmp_path, total_steps=12, stream=io.StringIO())
    with pytest.raises(UserError, match=r"metrics\.csv holds no training metrics.*'name,age'"):
        log.start({}, "name")
    assert path.read_text() == "name,age\nann,7\n"


WRITER = """
import io, sys
from rwkvtune.training.log import RunLog
log = RunLog(sys.argv[1], total_steps=10**9, stream=io.StringIO())
log.start({"n_layer": 4}, "name", step=int(sys.argv[2]), epoch=int(sys.argv[2]))
print("ready", flush=True)
for step in range(int(sys.argv[2]) + 1, 10**9):
    log.step({"step": step, "loss": 1 / step, "lr": 1e-3})
    log.epoch(step - 1, 1 / step, 1e-3, 0)
"""


def test_a_run_that_is_killed_leaves_whole_lines_only(tmp_path: Path) -> None:
    step = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            while (tmp_path / "metrics.csv").stat().st_size < 4000 + 40 * step:
                pass
            process.kill()
        assert process.returncode == -signal.SIGKILL
        for name in ("metrics.csv", "train_log.txt"):
            assert (tmp_path / name).read_bytes().endswith(b"\n")
        steps = [int(r["step"]) for r in metrics(tmp_path)]
        assert steps == list(range(1, steps[-1] + 1))
        step = steps[-1] - 5  # the last save


FILLER = """
import io, signal, sys
from rwkvtune.training.log import RunLog
log = RunLog(sys.argv[1], total_steps=100, stream=io.StringIO())
log.start({}, "name")
for step in range(1, 100):
    log.step({"step": step, "loss": 1 / step})
"""


def test_a_full_disk_is_an_error_that_says_so_and_leaves_no_half_line(tmp_path: Path) -> None:
    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    found = subprocess.run(
        [sys.executable, "-c", FILLER, str(tmp_path)],
        preexec_fn=limit_file_size, capture_output=True, text=True,
    )  # fmt: skip
    assert "UserError: cannot write" in found.stderr and "Make room" in found.stderr
    content = (tmp_path / "metrics.csv").read_bytes()
    assert 900 < len(content) <= 1000 and content.endswith(b"\n")


def test_plain_lines_hold_the_numbers_and_come_with_the_logged_steps(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, total_steps=2000, log_every=120, stream=stream)
    log.table([("model", "x070 L4"), ("tokens per step", 8192)])
    log.start({}, "name")
    for step in range(1, 241):
        if step == 200:
            log.validation(
                {
                    "step": 200,
                    "val_loss": 2.40123,
                    "val_perplexity": 11.04,
                    "val_bits_per_byte": 3.5,
                }
            )
        log.step({**row(step), "loss": 2.34562})
    lines = re.sub(r"time left \S+", "time left T", stream.getvalue()).splitlines()
    numbers = "lr 1.20e-03  norm 0.41  24.1k tokens/s  time left T"
    assert lines == [
        "model            x070 L4",
        "tokens per step  8192",
        f"step  120/2000  epoch 29  loss 2.3456  {numbers}",
        "step 200/2000  validation loss 2.4012  perplexity 11.04  3.5000 bits per byte",
        f"step  200/2000  epoch 49  loss 2.3456  val 2.4012  {numbers}",
        f"step  240/2000  epoch 59  loss 2.3456  val 2.4012  {numbers}",
    ]


def test_the_console_shows_the_mean_loss_since_its_last_line_and_the_file_that_of_the_step(
    tmp_path: Path,
) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, total_steps=7, log_every=3, stream=stream)
    log.start({}, "name")
    for step in range(1, 8):
        log.step({"step": step, "loss": 2.0**step})
    shown = re.findall(r"loss (\S+)", stream.getvalue())
    # (2 + 4 + 8) / 3, (16 + 32 + 64) / 3, and 128 alone at the end
    assert shown == ["4.6667", "37.3333", "128.0000"]
    assert [float(r["loss"]) for r in metrics(tmp_path)] == [8.0, 64.0, 128.0]


def test_time_left_follows_from_the_pace_of_the_latest_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    log = RunLog(tmp_path, total_steps=400, log_every=50, stream=stream)
    log.start({}, "name", step=100)
    for step in range(101, 401):
        now += 2.0 if step <= 150 else 0.5
        log.step(row(step))
    left = re.findall(r"time left (\S+)", stream.getvalue())
    # After 50 steps of 2 s: 250 x 2 s. After 50 of 2 s and 50 of 0.5 s: 200 x 1.25 s. At 350, the
    # latest 200 steps took 0.5 s each.
    assert (left[0], left[1], left[4], left[5]) == ("8:20", "4:10", "0:25", "0:00")


def test_a_terminal_shows_a_bar_with_the_same_numbers_and_keeps_its_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    log = RunLog(tmp_path, total_steps=20, log_every=10, stream=terminal)
    log.table([("model", "x070 L4")])
    log.start({}, "name")
    for step in range(1, 21):
        if step == 10:
            log.validation({"step": 10, "val_loss": 2.40123})
        log.step(row(step))
    log.line("a [bold]line[/bold] about /a/path")
    log.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "model  x070 L4" in plain
    assert "step 10/20  validation loss 2.4012\n" in plain
    assert "a [bold]line[/bold] about /a/path\n" in plain
    assert re.search(r"step 20/20 ━+ 100% time left 0:00\s", plain)
    mean = sum(map(loss_at, range(11, 21))) / 10
    numbers = f"epoch 4  loss {mean:.4f}  val 2.4012  lr 1.20e-03  norm 0.41  24.1k tokens/s"
    assert numbers in plain and max(map(len, plain.splitlines())) <= 80
    assert "\x1b[?25l" not in terminal.getvalue()  # "hide cursor"


def test_a_sample_cannot_upset_the_terminal(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    log = RunLog(tmp_path, total_steps=10, stream=stream)
    log.start({}, "name")
    log.sample("To be\n\x1b[2J\x07é", 5)
    assert raw.getvalue() == b"sample at step 5:\n  | To be\n  | \\ufffd[2J\\ufffd\\xe9\n"


def test_ranks_other_than_zero_write_and_print_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, total_steps=4, is_rank_zero=False, tensorboard=True, stream=stream)
    log.table([("model", "x070")])
    log.start({}, "name")
    log.validation({"step": 1, "val_loss": 2.0})
    assert not log.is_logged(1)
    log.step(row(1))
    log.epoch(0, 1.0, 1e-3, 0)
    log.sample("text", 1)
    log.line("text")
    log.close()
    assert stream.getvalue() == "" and list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_scalars_and_after_a_resume_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    for first, last in ((1, 6), (4, 8)):  # the save was after step 3
        log = RunLog(tmp_path, total_steps=8, tensorboard=True, stream=io.StringIO())
        log.start({"n_layer": 4}, "name", step=first - 1)
        for step in range(first, last + 1):
            log.layers(step, [{"att_grad_norm": step / 4}])
            log.step(row(step))
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {e.step: e.value for e in events.Scalars("loss")}
    assert found == pytest.approx({step: loss_at(step) for step in range(1, 9)})
    assert len(events.Scalars("lr")) == 8
    layers = events.Scalars("layers/00/att_grad_norm")
    assert [(e.step, e.value) for e in layers] == [(step, step / 4) for step in range(1, 9)]


def wandb_history(path: Path) -> list[dict[str, str]]:
    """The logged values in a .wandb file: protobuf records in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    raw, place, part, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:  # padding at the end of a block
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", raw[place + 4 : place + 7])
        part += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(part)  # type: ignore[attr-defined]
            if record.WhichOneof("record_type") == "history":
                rows.append({i.nested_key[0]: i.value_json for i in record.history.item})
            elif record.WhichOneof("record_type") == "run":
                rows.append({"project": record.run.project, "name": record.run.display_name})
            part = b""
    return rows


def test_after_a_resume_a_wandb_run_has_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, 1, 6, first_epoch=0)  # logs 2, 3, 4 and 6; the save was after step 4
    log = RunLog(tmp_path, total_steps=8, log_every=2, wandb_project="trial", stream=io.StringIO())
    log.start({}, "name", step=4)
    log.validation({"step": 5, "val_loss": 2.5})
    for step in range(5, 9):
        log.step(row(step))
    log.close()
    import wandb

    wandb.teardown()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    found = {int(r["_step"]): r for r in wandb_history(path)[1:]}
    assert list(found) == [2, 3, 4, 5, 6, 8]
    assert all(float(r["loss"]) == loss_at(step) for step, r in found.items())
    assert float(found[3]["val_loss"]) == loss_at(3) + 0.1 and "val_loss" not in found[4]
    assert float(found[4]["layers/00/att_grad_norm"]) == pytest.approx(4 / 3, rel=1e-5)


def test_wandb_gets_the_published_names_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = RunLog(tmp_path, total_steps=8, wandb_project="trial", stream=io.StringIO())
    log.start({"n_layer": 4}, "256 ctx256 L4 D256")
    log.layers(1, [{"decay_mean": 0.75}])
    log.step(row(1))
    log.validation({"step": 2, "val_loss": 2.5})
    log.step({**row(2), "tokens_per_s": None})
    log.close()
    import wandb

    wandb.teardown()  # waits for wandb's own process, which writes the file
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    run, *steps = wandb_history(path)
    assert run["project"] == "trial"
    assert re.fullmatch(r"256 ctx256 L4 D256 [\d-]{19}", run["name"])
    first, second = ({k: float(v) for k, v in s.items()} for s in steps)
    assert first["_step"] == 1 and second["_step"] == 2
    assert first["Gtokens"] == pytest.approx(8192e-9) and first["kt/s"] == pytest.approx(24.1)
    assert first["layers/00/decay_mean"] == 0.75
    assert first["loss"] == loss_at(1) and first["wd"] == 0.1 and first["lr"] == 1.2e-3
    assert second["val_loss"] == 2.5 and "kt/s" not in second


@pytest.mark.parametrize(
    ("module", "arguments", "package"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, "tensorboard"),
        ("wandb", {"wandb_project": "p"}, "wandb"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    arguments: dict[str, Any],
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'rwkvtune\[{package}\]'"):
        RunLog(tmp_path, total_steps=8, **arguments)


def test_logging_works_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rwkvtune.training.log"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_times_and_counts_are_short() -> None:
    seconds = (0.4, 92, 3723, 2 * 86400 + 3723)
    assert [duration(s) for s in seconds] == ["0:00", "1:32", "1:02:03", "2d 01:02:03"]
    assert [short_number(n) for n in (950, 24_100, 1.2e6, 3e9)] == ["950", "24.1k", "1.2M", "3.0G"]
