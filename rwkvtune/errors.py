"""The error types that mean "the user can put this right"."""

from __future__ import annotations


class UserError(ValueError):
    """Something given to us cannot be used.

    The message names what was given, what was needed and what to do, in one line. The command line
    prints it as `error: ...` without a traceback and exits with 2.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named does not exist; can be caught as FileNotFoundError too."""
