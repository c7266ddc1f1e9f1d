"""In which order the windows of a token file are read: pure functions of the number of the sample.

Samples are numbered 0, 1, 2, ... over the whole run, all epochs and ranks together, so that a
resumed run only has to know how many it has seen.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Protocol

import numpy as np

from rwkvtune.errors import UserError


class SampleOrder(Protocol):
    """Maps the number of a sample to the place where its window of ctx_len inputs (and ctx_len + 1
    tokens) starts.
    """

    num_tokens: int
    ctx_len: int

    @property
    def num_slots(self) -> int:
        """Samples in one pass over the data."""

    def start(self, sample_index: int) -> int:
        """Offset in tokens; sample_index >= 0, without an upper end."""


def magic_prime(num_tokens: int, ctx_len: int) -> int:
    """The largest prime p <= num_tokens // ctx_len - 1 with p % 3 == 2.

    Cubing permutes the residues modulo such a p. UserError when there is none, which is so below
    3 * ctx_len tokens.
    """
    from sympy import isprime  # takes a moment to import, and no other part of this file needs it

    slots = int(num_tokens) // int(ctx_len)
    if slots < 3:
        raise UserError(
            f"{num_tokens} tokens are too few for the published order at ctx_len {ctx_len}: it "
            f"needs at least {3 * ctx_len} (3 windows). Give more data"
            f"{_or_less(num_tokens // 3)}, or choose the shuffled order, which needs {ctx_len + 1}."
        )
    candidate = slots - 1 - (slots - 1 - 2) % 3
    while not isprime(candidate):
        candidate -= 3
    return candidate


class PublishedOrder:
    """The order of RWKV-LM: window floor(p * (sqrt(5) - 1) / 2) * ii^3 mod p, p the magic prime.

    ii = 1 + sample_index. With sample_index = samples before this epoch + j * ranks + rank this is
    upstream's formula, whose epochs are 40320 samples; here an epoch may have any length. After p
    samples each of the p windows was visited once, and the order repeats. It has no seed, windows
    start at multiples of ctx_len only, and tokens beyond p * ctx_len + 1 are never read.

    magic_prime: 0 = computed. A given one has to be a prime with p % 3 == 2 whose windows lie
    inside the data, and, as upstream demands, above 0.9 of the windows that the data has (or the
    largest there is).
    """

    def __init__(self, num_tokens: int, ctx_len: int, magic_prime: int = 0) -> None:
        self.num_tokens = int(num_tokens)
        self.ctx_len = int(ctx_len)
        self.magic_prime = _checked_prime(self.num_tokens, self.ctx_len, int(magic_prime))
        # In double precision like upstream: the exact product can have another floor.
        self._factor = int(self.magic_prime * ((math.sqrt(5) - 1) / 2))

    @property
    def num_slots(self) -> int:
        return self.magic_prime

    def start(self, sample_index: int) -> int:
        ii = 1 + int(sample_index)  # Python's integers: ii^3 * factor overflows 64 bits
        return (self._factor * ii**3) % self.magic_prime * self.ctx_len


class ShuffledOrder:
    """A seeded shuffle of all windows, another one in each pass.

    A pass has floor((num_tokens - 1) / ctx_len) windows, laid end to end, and visits each once.
    Where the first one starts is drawn for each pass between -ctx_len/2 and ctx_len/2 (what would
    stick out of the data is pushed back inside), so that small data are cut at other places each
    time; or from as much further on as it takes for the last windows to reach the end of the data.
    Except for less than two windows' worth at the two ends of the data, each target is
    therefore met exactly once per pass.

    Constant memory: the shuffle is a keyed Feistel permutation, computed for one sample at a time.
    It depends on seed, sizes and sample number only, not on any library's random generator, so it
    survives upgrades in mid-run.
    """

    def __init__(self, num_tokens: int, ctx_len: int, seed: int) -> None:
        self.num_tokens = int(num_tokens)
        self.ctx_len = int(ctx_len)
        self.seed = int(seed)
        _check_one_window(self.num_tokens, self.ctx_len)
        self._num_slots, left_over = divmod(self.num_tokens - 1, self.ctx_len)
        # The largest offset, ctx_len - 1 more than this, must not be below left_over.
        self._least_offset = max(-(self.ctx_len // 2), left_over - (self.ctx_len - 1))
        # Feistel halves: the smallest near-square rectangle of at least num_slots cells.
        self._rows = math.isqrt(self._num_slots - 1) + 1
        self._columns = -(-self._num_slots // self._rows)

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def start(self, sample_index: int) -> int:
        pass_number, position = divmod(int(sample_index), self._num_slots)
        offset_key, *round_keys = _digest(f"{self.seed} {pass_number}")
        offset = offset_key % self.ctx_len + self._least_offset
        start: int = self._shuffled(position, round_keys) * self.ctx_len + offset
        return min(max(start, 0), self.num_tokens - 1 - self.ctx_len)

    def _shuffled(self, position: int, round_keys: list[int]) -> int:
        """A permutation of 0 .. num_slots-1."""
        while True:
            row, column = divmod(position, self._columns)
            for number, key in enumerate(round_keys):
                if number % 2:
                    row = (row + _mix(key ^ column)) % self._rows
                else:
                    column = (column + _mix(key ^ row)) % self._columns
            position = row * self._columns + column
            if (
                position < self._num_slots
            ):  # else one of the few cells beyond: walk on along the cycle
                return position


class RandomOrder:
    """Windows that start anywhere, drawn with replacement: RWKV-LM's stages 0 and 4.

    Each start is drawn evenly from all places that leave room for a window and its last target. It
    depends on seed and sample number only, so ranks differ and a resumed run goes on exactly.
    """

    def __init__(self, num_tokens: int, ctx_len: int, seed: int) -> None:
        self.num_tokens, self.ctx_len = int(num_tokens), int(ctx_len)
        _check_one_window(self.num_tokens, self.ctx_len)
        self._key = _digest(f"{int(seed)} random")[0]

    @property
    def num_slots(self) -> int:
        """Windows that the data would hold side by side."""
        return (self.num_tokens - 1) // self.ctx_len

    def start(self, sample_index: int) -> int:
        # 64 bits over fewer than 2^40 places: no place is favoured by more than 1 in 2^24.
        return _mix(self._key ^ _mix(int(sample_index))) % (self.num_tokens - self.ctx_len)


def permutation(n: int, key: str) -> np.ndarray:
    """0 .. n-1 in an order that depends on n and key only, not on any library's generator."""
    start = np.uint64(_digest(key)[0])
    order: np.ndarray = np.argsort(_mixed(np.arange(n, dtype=np.uint64) ^ start), kind="stable")
    return order


def _mixed(x: np.ndarray) -> np.ndarray:
    """_mix of every element; uint64, whose products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _check_one_window(num_tokens: int, ctx_len: int) -> None:
    if num_tokens < ctx_len + 1:
        raise UserError(
            f"{num_tokens} tokens are too few for ctx_len {ctx_len}: one window needs "
            f"{ctx_len + 1}. Give more data{_or_less(num_tokens - 1)}."
        )


def _or_less(longest: int) -> str:
    """The other way out of too few tokens: the largest ctx_len that they are enough for."""
    return f" or use ctx_len <= {longest}" if longest > 0 else ""


def _digest(text: str) -> tuple[int, ...]:
    """Eight well-mixed numbers of 64 bits."""
    return struct.unpack("<8Q", hashlib.blake2b(text.encode(), digest_size=64).digest())


def _mix(x: int) -> int:
    """64 bits in, 64 well-mixed bits out (the finaliser of splitmix64: Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _checked_prime(num_tokens: int, ctx_len: int, given: int) -> int:
    largest = magic_prime(num_tokens, ctx_len)
    if given in (0, largest):
        return largest
    from sympy import isprime

    slots = num_tokens // ctx_len
    highest = (num_tokens - 1) // ctx_len  # windows that have their last target too
    if given % 3 != 2 or not isprime(given) or given > highest:
        raise UserError(
            f"magic_prime={given} does not fit this data: need a prime p with p % 3 == 2 and p <= "
            f"{highest} (= ({num_tokens} tokens - 1) // ctx_len {ctx_len}). Leave it away, or use "
            f"{largest}."
        )
    if given <= 0.9 * slots:
        raise UserError(
            f"magic_prime={given} would leave {1 - given / slots:.0%} of this data unread: "
            f"{num_tokens} tokens are {slots} windows of ctx_len {ctx_len}. Was it made for other "
            f"data or another ctx_len? Leave it away, or use {largest}."
        )
    return given
