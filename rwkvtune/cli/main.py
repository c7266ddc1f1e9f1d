"""`rwkvtune COMMAND`: picks the command and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from rwkvtune.errors import UserError

COMMANDS = {
    "demo": "train a small RWKV-7 on a bundled text, on the CPU, in minutes",
    "train": "pretrain a language model, or go on with a run (rwkvtune train --help)",
}
"""Each is a module of this folder with a `main(argv) -> exit code`, loaded only when it is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    2 for what the user can put right, 130 for Ctrl-C before training has begun.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from rwkvtune import __version__

        print(f"rwkvtune {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"error: unknown command {args[0]!r}\n\n{_help()}", file=sys.stderr)
        return 2
    command: Callable[[list[str]], int] = importlib.import_module(f"rwkvtune.cli.{args[0]}").main
    return guarded(command, args[1:])


def guarded(command: Callable[[list[str]], int], args: list[str]) -> int:
    """Call a command; a UserError becomes one line on stderr and exit code 2."""
    try:
        return command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: rwkvtune COMMAND [options]", "", "Train RWKV models.", "", "commands:", *lines]
    )


if __name__ == "__main__":
    sys.exit(main())
