"""What no reader may do, whatever the file says: run programs, reach the network, take all memory,
or never end."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
    "ctypes.dlopen",
)  # fmt: skip
TOO_LONG_S = 20
MEMORY = 2 << 30
"""Bytes that a process may have more than at its start."""

_is_reading = False


def _watch(event: str, details: tuple[Any, ...]) -> None:
    if _is_reading and event in FORBIDDEN:
        raise AssertionError(f"a file made its reader do {event} {details!r}")


sys.addaudithook(_watch)


def limit_memory() -> None:
    """For the rest of this process, so for one that only fuzzes."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


@contextmanager
def guarded() -> Iterator[None]:
    """Around the reading of one file."""
    global _is_reading

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"still reading after {TOO_LONG_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(TOO_LONG_S)
    _is_reading = True
    try:
        yield
    finally:
        _is_reading = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
