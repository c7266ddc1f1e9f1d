"""What can happen to a run, done to real runs: after each fault the same command goes on, and ends
with the numbers of the run that nothing happened to.

Each case returns a Row of the table that `python -m tests.faults` prints.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkvtune.checkpoint import load_weights, newest_resume_state, save_weights
from tests.training.runs import (
    Blow,
    Ended,
    Running,
    flags,
    losses,
    metrics,
    run,
    start,
    start_ranks,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "n_layer": 1, "n_embd": 64, "ctx_len": 32, "threads": 1, "precision": "fp32",
    "accelerator": "cpu", "micro_bsz": 1, "accumulate_grad_batches": 4, "epoch_steps": 10,
    "epoch_count": 3, "log_every": 1, "save_every": 3, "warmup_steps": 3, "order": "shuffled",
}  # fmt: skip
STEPS = 30
TWO_RANKS = {"accumulate_grad_batches": 2}
EQUAL = 1e-5
"""Between one process and two: sums in another order."""
PATIENCE_S = 240.0
GRACE_S = 15.0
"""torchrun's own is 30 s."""


@dataclass(frozen=True)
class Row:
    fault: str
    tried: int
    survived: int
    steps_lost: int
    """At most, over all tries."""


class Bench:
    """Runs of one small model, and the numbers that each must end with."""

    def __init__(self, text: Path, folder: Path, seed: int = 0) -> None:
        self.text, self.folder, self.dice = text, folder, random.Random(seed)
        self._names = iter(range(10**6))
        whole = self.new()
        ended = run(self.args(whole), folder / "out")
        assert ended.code == 0, ended.output
        self.whole, self.losses = whole, losses(whole)
        assert len(self.losses) == STEPS

    def new(self) -> Path:
        return self.folder / f"run-{next(self._names)}"

    def args(self, folder: Path, **changes: object) -> list[str]:
        return ["train", *flags(SETTINGS | {"data_file": self.text, "proj_dir": folder} | changes)]

    def ranks(self, folder: Path, blows: dict[int, Blow] | None = None) -> list[Running]:
        return start_ranks(self.args(folder, **TWO_RANKS), self.folder, 2, blows=blows)

    def logged(self, folder: Path) -> int:
        """Steps in metrics.csv so far."""
        return len(metrics(folder)) if (folder / "metrics.csv").exists() else 0

    def has_logged(self, folder: Path, steps: int) -> Callable[[], bool]:
        return lambda: self.logged(folder) >= steps

    def ends_well(self, folder: Path) -> bool:
        """Go on in one process to the end and compare every loss."""
        ended = run(self.args(folder), self.folder / "out")
        return ended.code == 0 and self.is_equal(folder)

    def is_equal(self, folder: Path) -> bool:
        found = losses(folder)
        pairs = zip(found, self.losses, strict=False)
        final = folder / "rwkv-final.pth"
        return len(found) == STEPS and all(abs(a - b) < EQUAL for a, b in pairs) and final.exists()

    def lost(self, folder: Path) -> int:
        """Logged steps that are not in the newest good state."""
        state = newest_resume_state(folder, report=lambda line: None)
        return max(0, self.logged(folder) - (int(state.name[5:]) if state else 0))


def killed_ranks(bench: Bench, times: int) -> Row:
    """kill -9 of either of two ranks, half of them during steps, half while files are written."""
    done = survived = worst = 0
    folder = bench.new()
    while done < times:
        victim, dice = bench.dice.randrange(2), bench.dice
        at_a_file = done % 2 == 0
        blows = {0: Blow(dice.randint(1, 60), str(folder))} if at_a_file else {}
        ranks = bench.ranks(folder, blows)
        if not at_a_file:
            goal = min(bench.logged(folder) + dice.randint(1, 6), STEPS - 1)
            try:
                ranks[0].wait_until(bench.has_logged(folder, goal), PATIENCE_S)
                time.sleep(0.1 * dice.random())
                ranks[victim].send(signal.SIGKILL)
            except (AssertionError, ProcessLookupError):
                pass  # it was over sooner
        ended = _as_under_torchrun(ranks)
        if all(e.code == 0 for e in ended):
            if not bench.is_equal(folder):
                survived -= 10**6
            folder = bench.new()
            continue
        done += 1
        worst = max(worst, bench.lost(folder))
        is_finished = (folder / "rwkv-final.pth").exists()  # the other may have left in peace
        survived += is_finished or all(e.code != 0 for e in ended)
    survived = survived if bench.ends_well(folder) else -1
    return Row("kill -9 of one of two ranks", times, survived, worst)


def _as_under_torchrun(ranks: list[Running]) -> list[Ended]:
    """How they end: torchrun kills what is left when one has failed, such as a rank that waits for
    one that was killed before they met."""
    while all(rank.process.is_alive() for rank in ranks):
        time.sleep(0.01)
    deadline = time.monotonic() + GRACE_S
    while any(rank.process.is_alive() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in ranks:
        if rank.process.is_alive():
            rank.send(signal.SIGKILL)
    return [rank.wait(PATIENCE_S) for rank in ranks]


def terminated(bench: Bench, times: int) -> Row:
    survived = worst = 0
    folder = bench.new()
    for _ in range(times):
        running = start(bench.args(folder), bench.folder / "out")
        goal = min(bench.logged(folder) + bench.dice.randint(1, 5), STEPS - 2)
        running.wait_until(bench.has_logged(folder, goal), PATIENCE_S)
        running.send(signal.SIGTERM)
        ended = running.wait(PATIENCE_S)
        worst = max(worst, bench.lost(folder))
        if ended.code == 0:
            folder = bench.new()
        survived += ended.code in (143, 0)
    return Row("SIGTERM", times, survived if bench.ends_well(folder) else -1, worst)


IN_A_SMALL_FILE_SYSTEM = """
set -u
mount -t tmpfs -o size={size} tmpfs {mount} || exit 77
{first}
mount -o remount,{then} {mount} || exit 77
{second}
code=$?
cp -a {mount}/run {result}
exit $code
"""


def in_a_small_file_system(
    bench: Bench, *, size: str, between: str, then: str, result: Path
) -> tuple[int, str]:
    """(exit code, output) of a run on a file system of its own, in a user's mount namespace, that
    is started once as `between` says, and again after remounting it with `then`."""
    mount = bench.folder / "mount"
    mount.mkdir(exist_ok=True)
    command = " ".join([sys.executable, "-m", "rwkvtune", *bench.args(mount / "run")])
    script = IN_A_SMALL_FILE_SYSTEM.format(
        size=size, mount=mount, first=between.format(command=command, mount=mount), then=then,
        second=command, result=result,
    )  # fmt: skip
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout + done.stderr


def full_disk(bench: Bench, times: int) -> Row:
    """ENOSPC from a file system that is too small by another amount each time."""
    survived = worst = 0
    for _ in range(times):
        result = bench.new()
        size = f"{bench.dice.randint(800, 2600)}k"  # a whole run takes about 3.5 MB
        tell = '{command}; echo "first: $?"; tail -n 1 {mount}/run/metrics.csv'
        code, output = in_a_small_file_system(
            bench, size=size, between=tell, then="size=100m", result=result
        )
        if code == 77:
            return Row("full disk (no mount namespaces here)", 0, 0, 0)
        told = "first: 2" in output and "are free there" in output and "Traceback" not in output
        survived += told and code == 0 and bench.is_equal(result)
        worst = max(worst, _steps_lost(output))
    return Row("full disk", times, survived, worst)


def read_only_folder(bench: Bench, times: int) -> Row:
    survived = worst = 0
    for _ in range(times):
        result = bench.new()
        tell = (
            "timeout -s KILL {seconds} {{command}} --save_every 1; mount -o remount,ro {{mount}}; "
            '{{command}}; echo "first: $?"; tail -n 1 {{mount}}/run/metrics.csv'
        )
        between = tell.format(seconds=round(5 + 4 * bench.dice.random(), 1))
        code, output = in_a_small_file_system(
            bench, size="100m", between=between, then="rw", result=result
        )
        if code == 77:
            return Row("read-only folder (no mount namespaces here)", 0, 0, 0)
        told = "first: 2" in output and "cannot write" in output and "Traceback" not in output
        survived += (told or "this run is finished" in output) and code == 0
        survived -= not bench.is_equal(result)
    return Row("read-only folder", times, survived, worst)


def _steps_lost(output: str) -> int:
    """From the last line of metrics.csv and the table of the run that went on."""
    logged = resumed = 0
    for line in output.splitlines():
        first = line.partition(",")[0]
        if first.isdecimal() and line.count(",") > 4:
            logged = int(first)
        if "resumed from" in line:
            resumed = int(line.rpartition("step-")[2])
    return max(0, logged - resumed)


def damaged_checkpoints(bench: Bench, times: int, *, going_on: int) -> Row:
    """The newest state cut at a random place or with one byte changed; going_on of them are also
    trained on to the end."""
    stopped = bench.new()
    running = start(bench.args(stopped), bench.folder / "out")
    running.wait_until(bench.has_logged(stopped, 14), PATIENCE_S)
    running.send(signal.SIGTERM)
    running.wait(PATIENCE_S)
    states = sorted(stopped.glob("resume/step-*"))
    assert len(states) == 2
    survived = worst = 0
    for number in range(times):
        folder = bench.new()
        shutil.copytree(stopped, folder)
        newest = folder / "resume" / states[1].name
        file = newest / bench.dice.choice(["state.safetensors"] * 3 + ["state.json"])
        content = bytearray(file.read_bytes())
        place = bench.dice.randrange(len(content))
        if number % 2:
            content[place] ^= 1 << bench.dice.randrange(8)
        else:
            del content[place:]
        file.write_bytes(content)
        found = newest_resume_state(folder, report=lambda line: None)
        is_found = found is not None and found.name == states[0].name
        worst = max(worst, bench.lost(folder))
        if number < going_on:
            is_found = is_found and bench.ends_well(folder)
        survived += is_found
        shutil.rmtree(folder)
    return Row("newest checkpoint cut or changed", times, survived, worst)


def dead_worker(bench: Bench, times: int) -> Row:
    """A process that the run has started itself dies: the whole run ends and goes on again."""
    survived = worst = 0
    for _ in range(times):
        folder = bench.new()
        args = bench.args(folder, **TWO_RANKS, devices=2)
        with subprocess.Popen(
            [sys.executable, "-m", "rwkvtune", *args],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as parent:
            _wait_for(bench.has_logged(folder, 4), parent)
            os.kill(_children(parent.pid)[-1], signal.SIGKILL)
            code = parent.wait(PATIENCE_S)
        worst = max(worst, bench.lost(folder))
        survived += code != 0 and bench.ends_well(folder)
    return Row("a worker process dies", times, survived, worst)


def _wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)


def _children(pid: int) -> list[int]:
    """Processes that run the command too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
            is_child = int(fields[1]) == pid
            if is_child and b"rwkvtune" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def not_a_number(bench: Bench, times: int) -> Row:
    """A weight that is NaN reaches the loss: the run stops before it spoils what it has."""
    survived = 0
    for _ in range(times):
        folder = bench.new()
        bad = bench.folder / "bad.pth"
        weights = load_weights(bench.whole / "rwkv-init.pth")
        name = bench.dice.choice([n for n in weights if n.endswith("key.weight")])
        weights[name] = weights[name].clone()
        weights[name].view(-1)[bench.dice.randrange(weights[name].numel())] = torch.nan
        save_weights(bad, weights)
        ended = run(bench.args(folder, load_model=bad), bench.folder / "out")
        told = "not moved and nothing was saved" in ended.output
        states = [path.name for path in folder.glob("resume/step-*")]
        is_fresh_well = bench.ends_well(bench.new())
        survived += ended.code == 2 and told and states == ["step-00000000"] and is_fresh_well
    return Row("NaN on the way to the loss", times, survived, 0)


def second_run(bench: Bench, times: int) -> Row:
    """A second run in the same folder, and one after the first was killed."""
    survived = worst = 0
    for _ in range(times):
        folder = bench.new()
        first = start(bench.args(folder), bench.folder / "first")
        first.wait_until(bench.has_logged(folder, 1), PATIENCE_S)
        first.send(signal.SIGSTOP)  # or it could end before the second has started
        second = run(bench.args(folder), bench.folder / "out")
        refused = second.code == 2 and "using" in second.output
        first.send(signal.SIGKILL)
        first.wait(PATIENCE_S)
        worst = max(worst, bench.lost(folder))
        survived += refused and bench.ends_well(folder)
    return Row("a second run in the folder", times, survived, worst)


def restarted_by_torchrun(bench: Bench, times: int) -> Row:
    """torchrun --max-restarts starts the ranks again; they find their state without a flag."""
    survived = worst = 0
    for _ in range(times):
        folder = bench.new()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--max-restarts", "2", "--master-port", "0", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0", "-m", "rwkvtune", *bench.args(folder, **TWO_RANKS),
        ]  # fmt: skip
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as agent:
            _wait_for(bench.has_logged(folder, 5), agent)
            os.kill(bench.dice.choice(_children(agent.pid)), signal.SIGKILL)
            worst = max(worst, bench.lost(folder))
            code = agent.wait(PATIENCE_S)
        survived += code == 0 and bench.is_equal(folder)
    return Row("a rank dies under torchrun --max-restarts", times, survived, worst)


Case = Callable[[Bench], Row]

FULL: dict[str, Case] = {
    "killed": lambda b: killed_ranks(b, 50),
    "terminated": lambda b: terminated(b, 8),
    "full_disk": lambda b: full_disk(b, 6),
    "read_only": lambda b: read_only_folder(b, 3),
    "damaged": lambda b: damaged_checkpoints(b, 60, going_on=3),
    "dead_worker": lambda b: dead_worker(b, 3),
    "nan": lambda b: not_a_number(b, 2),
    "second_run": lambda b: second_run(b, 3),
    "restarted": lambda b: restarted_by_torchrun(b, 4),
}
SHORT: dict[str, Case] = {
    "killed": lambda b: killed_ranks(b, 3),
    "full_disk": lambda b: full_disk(b, 1),
    "damaged": lambda b: damaged_checkpoints(b, 20, going_on=1),
    "second_run": lambda b: second_run(b, 1),
}
"""What the other tests of the folder tests/training do not do anyway."""
