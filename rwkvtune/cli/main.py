"""`rwkvtune COMMAND`: picks the command and turns errors into one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from rwkvtune.cli import output
from rwkvtune.errors import UserError, report

COMMANDS = {
    "alternating": "masks, attention, evaluation, sweeps of alternating-attention models",
    "chat": "talk with a model on the terminal",
    "configs": "list presets, show one, or write one from weights (rwkvtune configs --help)",
    "data": "make token files from text, or look into them (rwkvtune data --help)",
    "demo": "train a small RWKV-7 on a bundled text, on the CPU, in minutes",
    "eval": "measure a model on text files and on tasks of the lm-eval harness",
    "export": "turn weights into the forms of other RWKV programs, or back",
    "generate": "let a model write, from a prompt or from nothing",
    "inspect": "tell what a weights file or a run folder holds",
    "merge": "write the weights of a base with an adapter in them",
    "plan": "memory, speed, traffic and days of a run on machines that are not here",
    "report": "draw one or several runs side by side into a picture and an HTML page",
    "sft": "fine-tune a model on conversations (rwkvtune sft --help)",
    "vision": "let a model see pictures: train, ask, score (rwkvtune vision --help)",
    "train": "pretrain a language model, or go on with a run (rwkvtune train --help)",
}
"""Each is a module of this folder with a `main(argv) -> exit code`, loaded only when called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    2 for what the user can put right; 130 for Ctrl-C and 143 for SIGTERM where the command has no
    answer of its own.
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
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: unknown command {args[0]!r}: {hint}", file=sys.stderr)
        return 2
    return guarded(args[0], args[1:])


def guarded(name: str, args: list[str]) -> int:
    """Run a command; a UserError becomes one line on stderr and exit code 2, a reader of its output
    that leaves (`| head`) exit code 141."""
    answers = {signal.SIGTERM: _leave, signal.SIGINT: signal.default_int_handler}
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C's own too: a shell script starts its background processes with it ignored.
        before = {number: signal.signal(number, answer) for number, answer in answers.items()}
    try:
        command: Callable[[list[str]], int] = importlib.import_module(f"rwkvtune.cli.{name}").main
        try:
            return command(args)
        finally:
            output.finish()
    except ModuleNotFoundError as error:
        if (error.name or "rwkvtune").startswith("rwkvtune"):
            raise
        return report(
            UserError(
                f"{sys.executable} has no package {error.name}: use .venv/bin/python, which `make "
                "venv` makes, or `pip install .` in the clone with this Python"
            )
        )
    except (UserError, KeyboardInterrupt, BrokenPipeError) as error:
        return report(error)
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)


def run_door(name: str) -> int:
    """What a published program in the root folder calls: the module of this folder of that name."""
    return guarded(name, sys.argv[1:])


def rwkv_train() -> int:
    """The command rwkv-train: the same as `python train.py`."""
    return run_door("published_flags")


def _leave(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does by itself: unwind, so that temporary files and child processes go too."""
    sys.exit(128 + number)


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: rwkvtune COMMAND [options]", "", "Train RWKV models.", "", "commands:", *lines]
    )


if __name__ == "__main__":
    sys.exit(main())
