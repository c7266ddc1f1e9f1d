"""Which parameters of a model are trained, told by patterns on their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from rwkvtune.errors import UserError


def trained_names(names: Sequence[str], *, freeze: str, train_only: str) -> list[str]:
    """Those that train_only names (all when it is empty) without those that freeze names.

    Both are patterns apart by commas, such as "emb.*,blocks.0.*"; * stands for any text, ? for one
    character, [0-3] for one of several. UserError for a pattern that fits nothing, and when nothing
    is left.
    """
    chosen = set(_fitting(names, train_only, "train_only") if train_only else names)
    chosen -= set(_fitting(names, freeze, "freeze"))
    if not chosen:
        raise UserError(f"freeze={freeze!r} and train_only={train_only!r} leave nothing to train")
    return [name for name in names if name in chosen]


def _fitting(names: Sequence[str], patterns: str, flag: str) -> list[str]:
    found: list[str] = []
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(
                f"{flag}: {pattern!r} fits no parameter; there are {names[0]}, "
                f"{names[len(names) // 2]}, {names[-1]} and {len(names) - 3} more"
            )
        found += fitting
    return found
