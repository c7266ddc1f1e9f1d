"""Writing to stdout, which may be a pipe whose reader leaves before the end."""

from __future__ import annotations

import os
import sys

from rwkvtune.errors import UserError

READER_LEFT = 141
"""Exit code of a program that SIGPIPE ends, as a shell shows it."""


def write(text: str) -> None:
    """Put text on stdout at once, as UTF-8; surrogate escapes become the bytes they stand for.

    Ends the program without a word when the reader of a pipe has left (`| head`). UserError when
    the system does not take the bytes.
    """
    if sys.stdout is None:
        raise UserError("there is no standard output to write to")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()
    except OSError as error:
        # Python would try to write the rest again, and complain, when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_LEFT)
        raise UserError(f"cannot write the output: {error.strerror}") from error
