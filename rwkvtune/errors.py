"""The error types that mean "the user can put this right", and how an error ends a program."""

from __future__ import annotations

import sys
import traceback


class UserError(ValueError):
    """Something given to us cannot be used.

    The message names what was given, what was needed and what to do, in one line. The command line
    prints it as `error: ...` without a traceback and exits with 2.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named does not exist; can be caught as FileNotFoundError too."""


def report(error: BaseException) -> int:
    """Say on stderr why the program ends; returns the exit code that belongs to it.

    A UserError is one line and 2, Ctrl-C 130, sys.exit(n) n; all else is our mistake: its traceback
    and 1.
    """
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
