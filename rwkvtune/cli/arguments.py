"""argparse in the manner of our commands: no abbreviations, and what is wrong in one line."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from rwkvtune.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """`command` and `about` head the help, whose lines are kept as they are written."""

    def __init__(self, command: str, about: str) -> None:
        super().__init__(
            prog=command,
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
        flags = [part for part in found[1].split() if part.startswith("--")] if found else []
        if flags:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(flags[0].partition("=")[0], known, n=1)
            message = f"unknown flag {flags[0]}" + (f" (did you mean {near[0]}?)" if near else "")
        missing = re.fullmatch(r"argument (--\w+): expected one argument", message)
        if missing:
            message += f"; one that begins with - is written {missing[1]}=-..."
        raise UserError(f"{message} (see {self.prog} --help)")
