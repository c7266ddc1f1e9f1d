"""How a CPU run gets its memory."""

from __future__ import annotations

import ctypes
import sys

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
