"""Writing to stdout, which may be a pipe whose reader leaves before the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rwkvtune.errors import UserError, discard_rest


def write(text: str) -> None:
    """Put text on stdout at once, as UTF-8; surrogate escapes become the bytes they stand for.

    BrokenPipeError when the reader of a pipe has left (`| head`), which ends a command without a
    word. UserError when the system does not take the bytes.
    """
    if sys.stdout is None:
        raise UserError("there is no standard output to write to")
    with _failures_told():
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()


def finish() -> None:
    """Write what print() still holds; errors as from write."""
    if sys.stdout is not None:
        with _failures_told():
            sys.stdout.flush()


@contextmanager
def _failures_told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_rest(sys.stdout)
        raise UserError(f"cannot write the output: {error.strerror}") from error
