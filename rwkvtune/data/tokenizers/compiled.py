"""Longest matches by a trie that numba compiles: about four times as fast as pyrwkv-tokenizer.

Imported only where numba is installed (the extra `fast`) and there is much text, for compiling
takes a second the first time. The trie is a double array (Aoe, 1989): the child of `node` by `byte`
is `base[node] + byte`, if `parent` of that place is `node`; `value` is the id of the token that
ends there, or -1. A leaf has base 0, which is harmless: no place names it as its parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numba
import numpy as np

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT


def compiled(function: Any) -> Any:
    """The function in machine code, kept for the next process where there is a place for it."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)


class CompiledMatcher:
    """tokens: id and bytes of each token, all different and none empty."""

    def __init__(self, tokens: Iterable[tuple[int, bytes]]) -> None:
        by_bytes = sorted((token, id) for id, token in tokens)
        content = np.frombuffer(b"".join(token for token, _ in by_bytes), np.uint8)
        starts = np.zeros(len(by_bytes) + 1, np.int64)
        np.cumsum([len(token) for token, _ in by_bytes], out=starts[1:])
        ids = np.array([id for _, id in by_bytes], np.int32)
        self._trie = _build(content, starts, ids)

    def encode(self, texts: Sequence[bytes]) -> np.ndarray | None:
        """Ids of all texts, END_OF_DOCUMENT after each, uint32; None where no token fits."""
        content = b"".join(texts)
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        ids = np.empty(len(content) + len(texts), np.uint32)
        count = _encode(np.frombuffer(content, np.uint8), ends, *self._trie, ids)
        return None if count < 0 else ids[:count]


@compiled
def _grown(places, fill):  # type: ignore[no-untyped-def]
    twice = np.full(2 * len(places), fill, np.int32)
    twice[: len(places)] = places
    return twice


@compiled
def _build(content, starts, ids):  # type: ignore[no-untyped-def]
    """base, parent and value of the trie of sorted tokens: content[starts[i] : starts[i + 1]]."""
    size = 2 * len(content) + 1024
    base = np.zeros(size, np.int32)
    parent = np.full(size, -1, np.int32)
    value = np.full(size, -1, np.int32)
    parent[0] = 0
    # Nodes whose children have no place yet: node, first and last token below it, its depth.
    waiting = np.empty((len(content) + 1, 4), np.int32)
    waiting[0] = 0
    waiting[0, 2] = len(ids)
    count = 1
    first = np.empty(257, np.int32)  # token that each child begins with
    byte = np.empty(256, np.int32)
    free = 1
    while count:
        count -= 1
        node, depth = waiting[count, 0], waiting[count, 3]
        low, high = waiting[count, 1], waiting[count, 2]
        if starts[low + 1] - starts[low] == depth:
            value[node] = ids[low]
            low += 1
        children = 0
        for i in range(low, high):
            b = content[starts[i] + depth]
            if children == 0 or byte[children - 1] != b:
                byte[children], first[children] = b, i
                children += 1
        first[children] = high
        if not children:
            continue
        while parent[free] >= 0:
            free += 1
        at = max(1, free - byte[0])  # place 0 is the root's own
        fits = False
        while not fits:
            fits = True
            if at + 257 > len(base):
                base, parent, value = _grown(base, 0), _grown(parent, -1), _grown(value, -1)
            for c in range(children):
                if parent[at + byte[c]] >= 0:
                    fits = False
                    at += 1
                    break
        base[node] = at
        for c in range(children):
            child = at + byte[c]
            parent[child] = node
            waiting[count, 0], waiting[count, 1] = child, first[c]
            waiting[count, 2], waiting[count, 3] = first[c + 1], depth + 1
            count += 1
    return base, parent, value


@compiled
def _encode(content, ends, base, parent, value, ids):  # type: ignore[no-untyped-def]
    """Fill ids, and return how many there are; -1 where no token fits."""
    count = position = 0
    for end in ends:
        while position < end:
            node, token, stop = 0, -1, position
            for i in range(position, end):
                child = base[node] + content[i]
                if parent[child] != node:
                    break
                node = child
                if value[node] >= 0:
                    token, stop = value[node], i + 1
            if token < 0:
                return -1
            ids[count] = token
            count += 1
            position = stop
        ids[count] = END_OF_DOCUMENT
        count += 1
    return count
