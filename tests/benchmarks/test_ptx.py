"""What Triton's interpreter takes and its compiler does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_token_shift_compiles_for_all_its_flags() -> None:
    pytest.importorskip("triton", minversion="3.3")
    command = [sys.executable, "-m", "benchmarks.ptx", "--variants", "--sm", "80"]
    command += ["--only", "fused_shift"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line.partition("variant ")[2] for line in done.stdout.splitlines()]
    assert {name.split("  ")[0] for name in told} == {
        "reset", "before", "one share", "two shares", "fp16", "fp32",
    }  # fmt: skip
