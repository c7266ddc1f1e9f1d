"""GPU tests, then GPU benchmarks, in one go: `make gpu-check OUT=dir PEERS=dir`, under 8 minutes.

Writes <date>-<gpu>.json with the device, versions, whether the tests passed, and the measured rows;
docs/gpu.md tells what is in it. Without a GPU it says so and exits 0, so that one command serves
every machine. With --device cpu --tiny the same steps run on toy sizes, kernels in Triton's
interpreter: it shows that the command works, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIMIT_S = 465
"""No part begins that would not end by then, as far as can be foreseen."""
TEST_LIMIT_S = 150
TESTS_SIDE_BY_SIDE = ("wkv", "model", "not wkv and not model")
"""Expressions for pytest's -k that choose each test once."""
PEER_LIMIT_S = 60
MOST_TOKENS = 131072
"""Of a micro-batch: beyond it speed no longer changes."""
CHOICES = [
    ("wkv7", 16, "default"), ("wkv7", 16, "high"), ("wkv7", 32, "default"), ("wkv7", 32, "high"),
    ("wkv7", 64, "default"), ("wkv6", 16, "default"), ("wkv6", 16, "high"),
]  # fmt: skip
"""Kernel, chunk_len and precision."""
PROMISED_GB = 7.0
"""Peak memory of L12 D768 V65536, ctx 512, 16 rows, bf16, gradient checkpointing: RWKV-LM's
claim."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--peers", type=Path, help="folder with RWKV-LM and wind_rwkv")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the command")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu goes with --tiny; `make bench` measures a CPU")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import torch
    except ImportError:
        print("gpu-check: this python has no torch; run `make venv`, or name one: PYTHON=...")
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no GPU here, so there is nothing to check"
        )
        return 0
    return Check(options.device, options.tiny, options.peers).run(options.out)


class Check:
    """One run of the command: what it has found so far, and how much time it has left."""

    def __init__(self, device: str, tiny: bool, peers: Path | None) -> None:
        self.device, self.tiny, self.peers = device, tiny, peers
        self.repeats = 1 if tiny else 3
        self.begin = time.monotonic()
        self.result: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def run(self, out: Path) -> int:
        from benchmarks import machine

        self.out = out
        self.result = machine.describe(self.device)
        # What is told of every run, whatever becomes of its parts.
        self.result |= {"wkv7_fwd_bwd_ms": None, "step": [], "peers": {}}
        self.result |= {"left_out": self.left_out, "failed": self.failed}
        builds = self.build_peers()
        try:
            self.part("gpu_tests", self.run_tests, needs_s=0)
            self.part("copy_gb_per_s", self.measure_copies, needs_s=5)
            self.part("wkv7_fwd_bwd_ms", self.measure_wkv7, needs_s=15)
            self.part("minipile_memory", self.measure_minipile, needs_s=15)
            self.part("step", self.measure_steps, needs_s=20)
            self.part("peers", lambda: self.measure_peers(builds), needs_s=20)
            self.part("wkv7_choices", self.measure_choices, needs_s=30)
            self.part("adapters", self.measure_adapters, needs_s=30)
            self.part("wkv", self.measure_kernels, needs_s=30)
        finally:
            for build in builds.values():
                build.end()
        machine.write(out, self.name(), self.result)
        print(f"gpu-check took {time.monotonic() - self.begin:.0f} s")
        return 1 if self.failed or self.result.get("gpu_tests") != "passed" else 0

    def name(self) -> str:
        if self.device == "cpu":
            return "gpu-check-tiny"
        device = self.result["device"].lower().removeprefix("nvidia ")
        return re.sub(r"[^a-z0-9]+", "-", device).strip("-")

    def part(self, name: str, measure: Callable[[], Any], needs_s: float) -> None:
        """Put what `measure` gives under `name`, unless time is short, and write all that is known;
        an error is noted and the next part goes on."""
        from benchmarks import machine

        if not self.has_time(needs_s, name):
            return
        try:
            self.result[name] = measure()
            print(f"{name}: {json.dumps(self.result[name])}", flush=True)
            free_memory(self.device)  # fails, as all that follows, where the device is lost
        except Exception as error:
            self.failed.append(f"{name}: {type(error).__name__}: {error}"[:600])
            print(f"failed: {self.failed[-1]}", flush=True)
        machine.write(self.out, self.name(), self.result)

    def has_time(self, needs_s: float, name: str) -> bool:
        if time.monotonic() - self.begin + needs_s < LIMIT_S:
            return True
        self.left_out.append(name)
        print(f"out of time for {name}", flush=True)
        return False

    def run_tests(self) -> str:
        # Only the file of GPU tests: a GPU machine may lack what the other files import. Side by
        # side, as most of their time goes into compiling kernels, on one core each.
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", "-k"]
        running = [Running([*command, some]) for some in TESTS_SIDE_BY_SIDE]
        end = time.monotonic() + TEST_LIMIT_S
        codes = []
        for some, tests in zip(TESTS_SIDE_BY_SIDE, running, strict=True):
            codes.append(tests.wait(end - time.monotonic()))
            print(f"tests {some}:\n{tests.told()}", flush=True)
            tests.end()
        if None in codes:
            return f"not done in {TEST_LIMIT_S} s"
        return "failed" if any(codes) else "passed"

    def measure_copies(self) -> float:
        from benchmarks import machine

        return float(machine.copy_gb_per_s(self.device, 0.01 if self.tiny else 2.0))

    def measure_wkv7(self) -> float:
        """Milliseconds of forward and backward; `wkv7` gets what they are in bytes."""
        import torch

        from benchmarks import ptx, wkv
        from benchmarks.peers import SHAPE, TINY_SHAPE

        shape = TINY_SHAPE if self.tiny else SHAPE
        inputs = wkv.make_inputs("wkv7", shape, torch.bfloat16, self.device)
        times = [wkv.time_once("wkv7", inputs, "auto", self.device) for _ in range(12)][2:]
        forward, both = (statistics.median(column) for column in zip(*times, strict=True))
        counts = ptx.counts(64)
        self.result["wkv7"] = {"shape_BTHN": shape, "forward_ms": round(forward, 3), **counts}
        if not self.tiny:
            speed = self.result.get("copy_gb_per_s", float("nan"))
            self.result["wkv7"] |= {
                "moved_over_copy_speed": round(counts["moved_gb"] / both * 1e3 / speed, 3),
                "least_over_copy_speed": round(counts["least_gb"] / both * 1e3 / speed, 3),
            }
        return float(round(both, 3))

    def measure_choices(self) -> list[dict[str, Any]]:
        """What can be chosen for the kernels of wkv7 and wkv6: time, memory, and accuracy against
        the loop in fp64."""
        from benchmarks import wkv
        from benchmarks.peers import SHAPE, TINY_SHAPE

        rows = []
        for kernel, chunk_len, precision in CHOICES:
            label = f"{kernel} chunk_len {chunk_len} precision {precision}"
            if not self.has_time(15, label):
                continue
            shape = TINY_SHAPE if self.tiny else SHAPE
            try:
                row = wkv.measure_choice(kernel, chunk_len, precision, shape, self.device)
            except Exception as error:  # a tile may be too large for this device
                row = {"error": f"{type(error).__name__}: {error}"[:300]}
            rows.append({"kernel": kernel, "chunk_len": chunk_len, "precision": precision} | row)
            free_memory(self.device)
        return rows

    def measure_adapters(self) -> Any:
        """Steps of LoRA and packed bases against full fine-tuning at L12 D768."""
        missing = [name for name in ("peft", "bitsandbytes") if find_spec(name) is None]
        if missing:
            return f"not measured: no {', '.join(missing)}"
        from benchmarks.adapters import measure_steps

        if self.tiny:
            return measure_steps(self.device, micro_bsz=1, ctx_len=16, repeats=1, vocab_size=64)
        return measure_steps(self.device, micro_bsz=8, ctx_len=512, repeats=3, vocab_size=65536)

    def measure_kernels(self) -> dict[str, Any]:
        from benchmarks import wkv

        if self.tiny:
            return {}
        return {
            kernel: wkv.measure(kernel, self.device, 2)
            for kernel in ("wkv7", "wkv6")
            if self.has_time(25, f"benchmarks.wkv {kernel}")
        }

    def measure_minipile(self) -> dict[str, Any]:
        micro_bsz, ctx_len = (2, 32) if self.tiny else (16, 512)
        training = self.training(12, 768)
        row = training.measured(
            micro_bsz=micro_bsz, ctx_len=ctx_len, grad_cp=True, repeats=self.repeats
        )
        peak = row.get("peak_memory_gb")
        return {"peak_memory_gb": peak, "promised_gb": PROMISED_GB, "row": row}

    def measure_steps(self) -> list[dict[str, Any]]:
        """Rows of benchmarks.train_step with the largest micro-batch that fits."""
        rows: list[dict[str, Any]] = self.result["step"]
        for n_layer, n_embd in ((12, 768), (24, 2048)):
            if not self.has_time(25, f"steps of L{n_layer} D{n_embd}"):
                continue
            training = self.training(n_layer, n_embd)
            for ctx_len, grad_cp in ((4096, False), (4096, True), (512, False), (512, True)):
                size = f"L{n_layer} D{n_embd} ctx {ctx_len} grad_cp {grad_cp}"
                if not self.has_time(25 if n_embd > 768 else 12, size):
                    continue
                length = 32 if self.tiny else ctx_len
                most = 1 if self.tiny else MOST_TOKENS // ctx_len
                row = training.measured_at_most(
                    most, ctx_len=length, grad_cp=grad_cp, repeats=self.repeats
                )
                if row is None:
                    self.left_out.append(f"{size}: not even one row fits")
                else:
                    rows.append(row)
            del training
            free_memory(self.device)
        return rows

    def training(self, n_layer: int, n_embd: int) -> Any:
        from benchmarks.train_step import Training
        from rwkvtune.models import RWKV7Config

        if self.tiny:
            config = RWKV7Config(vocab_size=256, n_layer=n_layer // 12, n_embd=64)
        else:
            config = RWKV7Config(vocab_size=65536, n_layer=n_layer, n_embd=n_embd)
        return Training(config, "bf16", self.device)

    def peer_command(self, name: str) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.peers", name, "--device", self.device]
        if self.peers is not None:
            command += ["--peers", str(self.peers)]
        return command + ["--tiny"] * self.tiny

    def build_peers(self) -> dict[str, Running]:
        """Begin to compile the peers, beside the tests: nvcc takes minutes for all of theirs."""
        from benchmarks.peers import present

        if self.peers is not None:
            # torch leaves one where a build was ended, and waits for ever for it to go.
            for lock in (self.peers / "build").glob("*/lock"):
                lock.unlink()
        return {
            name: Running([*self.peer_command(name), "--build"]) for name in present(self.peers)
        }

    def measure_peers(self, builds: dict[str, Running]) -> dict[str, Any]:
        found: dict[str, Any] = self.result["peers"]
        for name, build in builds.items():
            if not self.has_time(15, f"peer {name}"):
                continue
            left = LIMIT_S - (time.monotonic() - self.begin)
            code = build.wait(min(left - 15, 150))
            told = build.told()
            if code is None:
                found[name] = {"commit": None, "ratios": {}, "error": "still being compiled"}
                continue
            if code == 0:
                peer = Running(self.peer_command(name))
                limit = 2 * PEER_LIMIT_S if name == "rwkv-lm-step" else PEER_LIMIT_S
                code = peer.wait(limit)
                told = peer.told()
                peer.end()
                if code is None:
                    found[name] = {"commit": None, "ratios": {}, "error": f"took over {limit} s"}
                    continue
            found[name] = last_json(told)
            print(f"peer {name}: {json.dumps(found[name])}", flush=True)
        return found


class Running:
    """A command in a process group of its own, so that what it starts ends with it. Its output goes
    into a file: a pipe that nobody reads makes the command wait."""

    def __init__(self, command: list[str]) -> None:
        self.output = tempfile.TemporaryFile("a+", errors="replace")  # noqa: SIM115 -- end closes it
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, limit_s: float) -> int | None:
        """Its exit code; None where it takes longer."""
        try:
            return self.process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            return None

    def told(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()


def last_json(told: str) -> dict[str, Any]:
    """The result in a peer's output; what it said where there is none."""
    for line in reversed(told.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {"commit": None, "ratios": {}, "error": told[-600:] or "ended without a word"}


def free_memory(device: str) -> None:
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
