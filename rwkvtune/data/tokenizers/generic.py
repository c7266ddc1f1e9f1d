"""Tokenizers from vocabulary files of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rwkvtune.data.tokenizers.base import utf8
from rwkvtune.data.tokenizers.custom import BaseTokenizer
from rwkvtune.data.tokenizers.vocabulary import (
    VocabularyTokenizer,
    read_vocabulary,
    save_vocabulary,
)
from rwkvtune.errors import UserError


class GenericTokenizer(VocabularyTokenizer, BaseTokenizer):
    """The tokenizer of a vocabulary file; a text is cut from its start, always taking the longest
    token that fits.

    vocab_file: lines `<id> <Python literal of a str or bytes> <length in bytes>`; blank lines and
    comments after # are allowed.
    padded_vocab_size: rows of the model, from the largest id + 1 up, such as 65536 for the World
    vocabulary, whose tokens end at 65529; 0 = the largest id + 1.
    """

    def __init__(self, vocab_file: str | os.PathLike[str], padded_vocab_size: int = 0) -> None:
        super().__init__(read_vocabulary(vocab_file), padded_vocab_size)

    def encodeBytes(self, src: bytes) -> list[int]:
        """Ids of text in UTF-8."""
        try:
            return self.encode(src.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"byte {error.start} ({src[error.start]:#04x}) is not UTF-8 ({error.reason}): give "
                "the bytes of text"
            ) from None

    def decodeBytes(self, tokens: Sequence[int]) -> bytes:
        return self.decode_bytes(tokens)

    def printTokens(self, tokens: Sequence[int]) -> None:
        """Print each id beside what it stands for."""
        for id in tokens:
            print(f"{id} {self.decode_bytes([id])!r}")


def create_vocab_file_from_tokens(
    tokens: Sequence[str | bytes], filepath: str | os.PathLike[str]
) -> str:
    """Write a vocabulary file in which the tokens have the ids 1, 2, 3, ... in their order; returns
    its path.

    UserError for a token that is empty or comes twice.
    """
    if isinstance(tokens, str | bytes):
        raise UserError(f"tokens={tokens[:40]!r} is one text: give a list of tokens")
    of_id: dict[int, bytes] = {}
    first_seen: dict[bytes, int] = {}
    for number, token in enumerate(tokens):
        if not isinstance(token, str | bytes) or not token:
            raise UserError(f"tokens[{number}] is {token!r}: expected a text that is not empty")
        content = utf8(token) if isinstance(token, str) else token
        if content in first_seen:
            raise UserError(
                f"tokens[{number}] is {token!r}, as is tokens[{first_seen[content]}]: give each "
                "token once"
            )
        first_seen[content] = number
        of_id[1 + number] = content
    if not of_id:
        raise UserError("tokens is empty: give at least one token")
    save_vocabulary(of_id, filepath)
    return os.fspath(filepath)
