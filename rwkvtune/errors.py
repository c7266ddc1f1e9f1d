"""The error types that mean "the user can put this right", and how an error ends a program."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TextIO

READER_LEFT = 141
"""Exit code of a program that SIGPIPE ends, as a shell shows it."""


class UserError(ValueError):
    """Something given to us cannot be used.

    The message names what was given, what was needed and what to do, in one line. The command line
    prints it as `error: ...` without a traceback and exits with 2.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named does not exist; can be caught as FileNotFoundError too."""


def report(error: BaseException) -> int:
    """Say on stderr why the program ends; returns the exit code that belongs to it.

    A UserError is one line and 2, Ctrl-C 130, sys.exit(n) n, a pipe whose reader has left (`|
    head`) nothing and 141; all else is our mistake: its traceback and 1.
    """
    if isinstance(error, BrokenPipeError):
        discard_rest(sys.stdout)
        return READER_LEFT
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return error.code or 0
    traceback.print_exception(error)
    return 1


def discard_rest(stream: TextIO) -> None:
    """Let what is still to be written to a broken stream go nowhere: Python would write it again
    when it closes the stream, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
