"""The tokenizer that belongs to a weights file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from rwkvtune.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from rwkvtune.errors import UserError

WORLD_ROWS = range(65530, 65537)
"""Sizes of vocabulary that the World tokenizer is assumed for."""


def tokenizer_for(
    path: Path, vocab_size: int, spec: str, say: Callable[[str], object]
) -> Tokenizer:
    """The tokenizer named by spec, else the one kept with the weights, else World where its size
    says so; UserError when there is none, or it has more ids than the model.

    say: is told when one is assumed.
    """
    tokenizer = load_tokenizer(spec) if spec else find_tokenizer(path)
    if tokenizer is None and vocab_size in WORLD_ROWS:
        say(f"tokenizer: none is kept with {path}, world is assumed for {vocab_size} ids")
        tokenizer = load_tokenizer("world")
    if tokenizer is None:
        raise UserError(
            f"{path} has no tokenizer beside it, and {vocab_size} ids tell of none: give "
            "--tokenizer bytes, world or the tokenizer.json of the training data"
        )
    needed = 1 + max(set(range(tokenizer.vocab_size)) - set(tokenizer.unused_ids))
    if needed > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has ids up to {needed - 1}, {path} knows 0 to "
            f"{vocab_size - 1}: give --tokenizer the one that it was trained with"
        )
    return tokenizer


def without_text(tokenizer: Tokenizer, vocab_size: int) -> Collection[int]:
    """Ids of the model that stand for no text: the tokenizer's own, and a padded vocabulary's."""
    unused = (id for id in tokenizer.unused_ids if id < vocab_size)
    return {*unused, *range(tokenizer.vocab_size, vocab_size)}
