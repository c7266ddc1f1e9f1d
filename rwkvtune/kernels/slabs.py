"""Cutting a batch of sequences into slabs: parts whose temporaries stay in the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slab(NamedTuple):
    """`chunks` chunks of `chunk_len` tokens of the batch rows `rows`, from token `start` on."""

    rows: slice
    start: int
    chunks: int
    chunk_len: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows.stop - self.rows.start, self.chunks, self.chunk_len

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.chunk_len)

    def of(self, x: Tensor) -> Tensor:
        """The slab of x [B,T,H,N] as a view [chunks, rows, H, chunk_len, N]."""
        R, _, H, N = x[self.rows].shape
        x = x[self.rows, self.tokens].view(R, self.chunks, self.chunk_len, H, N)
        return x.permute(1, 0, 3, 2, 4)


def cut(
    like: Tensor,
    *,
    chunk_len: int,
    rows_per_thread: int,
    rows_gpu: int,
    chunks_at_least: int = 1,
    powers_of_two: bool = False,
) -> list[list[Slab]]:
    """The slabs of inputs [B,T,H,N]: for each group of batch rows, its slabs in order of time.

    rows_per_thread, rows_gpu: tokens times heads in one slab, per CPU thread and on a GPU.
    chunks_at_least: what a slab has before it takes in another batch row.
    The last tokens, fewer than chunk_len, are one shorter chunk or, with powers_of_two, several
    whose lengths are powers of two.
    """
    B, T, H, _ = like.shape
    on_cpu = like.device.type == "cpu"
    slab_rows = rows_per_thread * torch.get_num_threads() if on_cpu else rows_gpu
    chunk_len = min(chunk_len, T)
    if powers_of_two:
        chunk_len = 1 << (chunk_len.bit_length() - 1)
    side_by_side = min(chunks_at_least, T // chunk_len)
    rows = max(1, min(B, slab_rows // (H * chunk_len * side_by_side)))
    chunks = max(1, slab_rows // (rows * H * chunk_len))
    groups = []
    for first in range(0, B, rows):
        batch_rows = slice(first, min(first + rows, B))
        slabs = []
        start = 0
        while T - start >= chunk_len:
            count = min(chunks, (T - start) // chunk_len)
            slabs.append(Slab(batch_rows, start, count, chunk_len))
            start += count * chunk_len
        while start < T:
            rest = T - start
            length = 1 << (rest.bit_length() - 1) if powers_of_two else rest
            slabs.append(Slab(batch_rows, start, 1, length))
            start += length
        groups.append(slabs)
    return groups
