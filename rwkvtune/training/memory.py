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
    """The most memory that a process has used beyond what it had when this was made.

    On a GPU, what torch has allocated there. On Linux CPUs, the process's peak without the pages of
    mapped files, which are the data on the disk and can be dropped at any time.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._before = _kilobytes("RssAnon")

    def used(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device_type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak, mapped = _kilobytes("VmHWM"), _kilobytes("RssFile")
        if self._before is None or peak is None or mapped is None:
            return None
        return (peak - mapped - self._before) * 1024


def _kilobytes(name: str) -> int | None:
    """A line of Linux's account of this process."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else None
