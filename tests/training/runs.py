"""Training runs in processes of their own, which can be killed at chosen moments.

Processes are forked from a server that has imported everything, so that one costs a fraction of a
second; each runs the command line's own `main`.
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["rwkvtune.cli.train", "rwkvtune.training.lm", "rwkvtune.training.report", "sympy"]
)

DISK_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

NOT_REPEATED = ("tokens_per_s", "seconds")
"""Columns of metrics.csv that are times."""


class Blow(NamedTuple):
    """A signal that a process sends itself just before it opens or changes a file."""

    number: int
    """Which of the disk events that fit, from 1 on."""
    path: str = ""
    """What the path must contain."""
    signal: int = signal.SIGKILL


class Ended(NamedTuple):
    code: int
    """As multiprocessing gives it: minus the signal's number for a process that was killed."""
    output: str


@dataclass
class Running:
    process: ForkServerProcess
    output: Path

    def wait(self, timeout: float = 600.0) -> Ended:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output.read_text()}")
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, self.output.read_text())

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_until(self, happened: Callable[[], object], timeout: float = 600.0) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.is_alive(), f"ended too early:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"it never happened:\n{self.output.read_text()}"
            time.sleep(0.002)


def is_paused(running: Running) -> bool:
    """Whether a SIGSTOP holds it; needs Linux."""
    stat = Path(f"/proc/{running.process.pid}/stat").read_text()
    return stat.rpartition(") ")[2].startswith("T")


def start(
    args: Sequence[str],
    output: Path,
    blow: Blow | None = None,
    environment: Mapping[str, str] | None = None,
    rows: Path | None = None,
) -> Running:
    """`rwkvtune ARGS...` in a new process; stdout and stderr go to a file.

    rows: a prefix of files that get a line for each window that is trained on; see trained_rows.
    """
    # A daemon: ended with the tests, should one of them fail before it has.
    live = (list(args), str(output), blow, environment, rows)
    process = _SERVER.Process(target=_live, args=live, daemon=True)
    process.start()
    return Running(process, output)


def run(
    args: Sequence[str], output: Path, blow: Blow | None = None, rows: Path | None = None
) -> Ended:
    return start(args, output, blow, rows=rows).wait()


def start_ranks(
    args: Sequence[str],
    outputs: Path,
    world_size: int,
    last_rank: Sequence[str] = (),
    blows: Mapping[int, Blow] | None = None,
    rows: Path | None = None,
) -> list[Running]:
    """The processes of a distributed run, as torchrun starts them; each has a file in `outputs`.

    last_rank: flags that only the last one gets.  blows: by rank.
    rows: as in `start`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(world_size):
        environment = rank_environment(rank, world_size, port)
        own = [*args, *last_rank] if rank == world_size - 1 else args
        blow = (blows or {}).get(rank)
        running.append(start(own, outputs / f"rank-{rank}", blow, environment, rows))
    return running


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables by which torchrun tells a process of one machine what it is."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def _live(
    args: list[str],
    output: str,
    blow: Blow | None,
    environment: Mapping[str, str] | None,
    rows: Path | None,
) -> None:
    os.environ.update(environment or {})
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if blow is not None:
        seen = 0

        def strike(event: str, details: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in DISK_EVENTS and blow.path in str(details[0]):
                seen += 1
                if seen == blow.number:
                    os.kill(os.getpid(), blow.signal)

        sys.addaudithook(strike)
    if rows is not None:
        _note_rows(rows)
    from rwkvtune.cli.main import main

    sys.exit(main(args))


def _note_rows(prefix: Path) -> None:
    """Let every language-model batch that is trained on leave the digests of its rows."""
    from rwkvtune.training.lm import LanguageModelRecipe

    loss = LanguageModelRecipe.loss

    def noting(recipe: Any, model: Any, batch: Any, carry: Any) -> Any:
        with open(f"{prefix}-{os.getpid()}", "a") as file:
            for row in batch.input_ids.numpy():
                file.write(hashlib.sha256(row.tobytes()).hexdigest() + "\n")
        return loss(recipe, model, batch, carry)

    LanguageModelRecipe.loss = noting  # type: ignore[method-assign, assignment]


def trained_rows(prefix: Path) -> Counter[str]:
    """How often each window was trained on, over all processes that were started with `prefix`."""
    files = prefix.parent.glob(f"{prefix.name}-*")
    return Counter(line for path in files for line in path.read_text().splitlines())


def flags(settings: Mapping[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the times."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in NOT_REPEATED} for row in rows]


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in metrics(folder) if row["loss"]]


def epoch_lines(folder: Path) -> list[str]:
    """The lines of train_log.txt about epochs, without the time of the day."""
    time_of_day = re.compile(r" \d{4}-\d\d-\d\d \S+ ")
    lines = (folder / "train_log.txt").read_text().splitlines()
    return [time_of_day.sub(" ", line) for line in lines if re.match(r"\d+ \d", line)]


def outcome(folder: Path) -> dict[str, object]:
    """All that two runs of the same settings must have in common, to the last bit."""
    last_state = max(folder.glob("resume/step-*")) / "state.safetensors"
    return {
        "files": {path.name: digest(path) for path in [*folder.glob("rwkv-*.pth"), last_state]},
        "metrics": metrics(folder),
        "layers": (folder / "layers.csv").read_text(),
        "epochs": epoch_lines(folder),
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
