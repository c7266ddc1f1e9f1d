"""How a CPU run gets its memory, and how much a run has used."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Settings of glibc's mallopt (malloc.h)."""


def keep_freed_memory() -> None:
    """Let glibc reuse the large tensors of one step in the next, instead of returning them.

    By default each large tensor is fresh memory, which the system fills with zeros page by page.
    Keeping it took 3 to 10 % off the steps of benchmarks/train_step.py on 2 cores, at the same
    peak. Does nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TOP_PAD, 64 << 20)


class PeakMemory:
    """The most memory that this process uses.

    On a GPU, what torch has allocated there. On Linux, the process's peak; of files that are mapped
    into it only those that were when this was made, which are libraries: the pages of token files
    can be dropped at any time.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._files_before = _bytes_of("RssFile")
        self.before = 0 if device_type == "cuda" else _bytes_of("VmRSS")
        """Bytes that were in use when this was made; 0 where the system does not tell."""

    def used(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device_type == "cuda":
            return torch.cuda.max_memory_allocated()
        if not self.before:
            return None
        return _bytes_of("VmHWM") - _bytes_of("RssFile") + self._files_before


def free_memory(device_type: str) -> int | None:
    """Bytes that a run could have: those of the GPU, or what Linux would give now; None where the
    system does not tell."""
    if device_type == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    return _bytes_of("MemAvailable", "/proc/meminfo") or None


def _bytes_of(name: str, account: str = "/proc/self/status") -> int:
    """A line of one of Linux's accounts, by default that of this process; 0 elsewhere."""
    status = Path(account)
    text = status.read_text() if status.exists() else ""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
