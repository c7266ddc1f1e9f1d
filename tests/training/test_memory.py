"""Memory that a process used, against bytes that a fresh process is made to use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURED = """
import mmap, sys
import numpy as np
from rwkvtune.training.memory import PeakMemory

memory = PeakMemory("cpu")
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[i] for i in range(0, len(mapped), 4096))
block = np.ones(160_000_000, np.uint8)
del block
print(memory.before, memory.used())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_counts_what_was_freed_and_not_what_was_mapped(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(bytes(100_000_000))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "tokens")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, used = map(int, done.stdout.split())
    assert before > 100_000_000, "torch alone is larger"
    assert 150_000_000 < used - before < 190_000_000
