"""What the Triton kernels of the recurrences share: tiles of a chunk, and how a sequence is spread
over a device.

Kernels that go chunk after chunk run one program per head and block of values, since the columns
of the state, written X = Sᵀ [key, value], do not see each other. Where batch times heads is too
small to fill the device, the sequence is cut into segments that run side by side: Xn = Mᵀ X0 + H
holds for a segment as it does for a token; M and H come from two runs of the forward kernel (from
the identity without values, and from zero), and a short loop over the segments gives each its
entering state. The backward does the same with Mᵀ in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .calls import apply, without_autocast

CHUNK_LEN = 16
"""Tokens per chunk. Compiled for sm_90, 32 keep half the states and save no instruction, and their
tiles no longer fit into registers."""
PROGRAMS_PER_PROCESSOR = 2
"""Below so many sequential programs for each multiprocessor, the sequence is cut into segments."""
SEGMENT_CHUNKS = 16
"""A segment has at least so many chunks, since the states between segments come one by one."""
LEAST_SEGMENTS = 3
"""Fewer segments take longer than one: each is run twice beside its own run, together as long."""
SIZES = ["T", "H", "chunks", "segments", "chunks_per_segment", "tokens"]
"""Arguments whose values Triton shall not compile a kernel of its own for: lengths of prompts
differ from call to call, and none of these makes an address easier to compute."""


def values_per_program(N: int, capability: int) -> int:
    """Columns of the state that one program of the sequential kernels carries. More share what is
    computed from the keys; the limit is what fits into registers.

    capability: of an NVIDIA device, such as 90; 0 for all others.
    """
    return N if capability >= 90 and N <= 64 else min(N, 32)


def run_on_device(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`apply` where the first of the tensors is: Triton launches on the current device."""
    with torch.cuda.device_of(args[0]):
        return apply(function, *args)


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def chunk_and_head(H, chunks):
    """What a program of a kernel that takes all chunks at once works on. One number counts both:
    CUDA's grids end at 65535 in all directions but the first. Heads of a chunk lie side by side in
    memory, so that their programs follow each other."""
    program = tl.program_id(0)
    row = program // H
    return row % chunks, row // chunks * H + program % H


@triton.jit
def part_head_and_segment(parts):
    """What a program of a sequential kernel works on."""
    program = tl.program_id(0)
    return program % parts, program // parts, tl.program_id(1)


@triton.jit
def place(bh, chunk, T, H, N: tl.constexpr, n: tl.constexpr):
    """Where a chunk's first token is in a [B,T,H,N] tensor, the offsets [n, 1] of its tokens from
    there, and which of them exist. Only the first number needs 64 bits: one register pair for a
    tile instead of one for each of its elements."""
    row = tl.arange(0, n)
    origin = ((bh // H).to(tl.int64) * T + chunk * n) * H * N + (bh % H) * N
    return origin, (row * (H * N))[:, None], (chunk * n + row < T)[:, None]


@triton.jit
def read(x, origin, tile, exists):
    return tl.load(x + origin + tile, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def write(x, origin, tile, exists, value):
    tl.store(x + origin + tile, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def documents(reset, bh, chunk, T, H, n: tl.constexpr, HAS_RESET: tl.constexpr):
    """Which document of the chunk each token is in, 0 being the one that began before it."""
    document = tl.zeros([n], tl.int32)
    if HAS_RESET:
        token = chunk * n + tl.arange(0, n)
        starts = tl.load(reset + (bh // H).to(tl.int64) * T + token, mask=token < T, other=0)
        document = tl.cumsum(starts.to(tl.int32), 0)
    return document


@triton.jit
def last_of(document, HAS_RESET: tl.constexpr):
    """The document that the chunk ends in."""
    last = 0  # a constant, so that what asks for it is left out of the program
    if HAS_RESET:
        last = tl.max(document, 0)
    return last


@triton.jit
def triangle(product, document, n: tl.constexpr, STRICT: tl.constexpr):
    """product [n, n] where the token of the row may see that of the column, else 0."""
    token = tl.arange(0, n)
    if STRICT:
        seen = token[:, None] > token[None, :]
    else:
        seen = token[:, None] >= token[None, :]
    return tl.where(seen & (document[:, None] == document[None, :]), product, 0.0)


class Spread:
    """The sizes and the grid of one call."""

    def __init__(self, r: Tensor, chunk_len: int) -> None:
        self.B, self.T, self.H, self.N = r.shape
        self.chunks = triton.cdiv(self.T, chunk_len)
        self.chunk_len = chunk_len
        self.values = values_per_program(self.N, _capability(r.device))
        self.parts = self.N // self.values
        wanted = PROGRAMS_PER_PROCESSOR * _processors(r.device)
        programs = self.B * self.H * self.parts
        segments = min(wanted // programs, self.chunks // SEGMENT_CHUNKS)
        self.segments = segments if segments >= LEAST_SEGMENTS else 1
        self.chunks_per_segment = triton.cdiv(self.chunks, self.segments)
        self.segments = triton.cdiv(self.chunks, self.chunks_per_segment)

    @property
    def sequential(self) -> tuple[int, int]:
        return self.parts * self.B * self.H, self.segments

    @property
    def parallel(self) -> tuple[int]:
        return (self.chunks * self.B * self.H,)

    def states(self, like: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return like.new_empty(self.B, self.H, count, self.N, self.N, dtype=dtype)

    def kept_states(self, like: Tensor, precision: str) -> Tensor:
        """Room for the state that enters each chunk, until the backward."""
        is_short = like.dtype != torch.float32 and precision == "tf32"
        return self.states(like, self.chunks, torch.bfloat16 if is_short else torch.float32)

    def run_segments(
        self, run: Callable[..., Tensor], state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run a forward kernel over the sequence; returns the final state [B, H, N, N] and, of
        several segments, what each does to a state.

        run(entering, IDENTITY=, WRITE_Y=, WRITE_STATES=) gives the state that leaves each segment.
        """
        entering, transfers = None if state is None else state.contiguous(), None
        if self.segments > 1:
            alone = {"WRITE_Y": False, "WRITE_STATES": False}
            transfers = run(None, IDENTITY=True, **alone)
            entering = _scan(run(None, IDENTITY=False, **alone), transfers, entering)
        final = run(entering, IDENTITY=False, WRITE_Y=True, WRITE_STATES=keep)
        return final[:, :, -1].contiguous(), transfers

    def run_segments_back(
        self, run: Callable[..., Tensor], d_final: Tensor, transfers: Tensor | None
    ) -> Tensor:
        """Run a kernel of state gradients; returns that of the initial state.

        run(d_leaving, write) gives the gradient of the state that entered each segment.
        """
        d_leaving = d_final.contiguous()
        if transfers is not None:
            backwards = transfers.mT.flip(2)
            d_leaving = _scan(run(None, False).flip(2), backwards, d_leaving).flip(2)
        return run(d_leaving, True)[:, :, 0].contiguous()


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def operands_of(dtype: torch.dtype, precision: str) -> str:
    """Triton's name for a precision. AMD's matrix units know no tf32."""
    if torch.version.hip:
        return "ieee"
    may_round = dtype != torch.float32 or _may_use_tf32()
    return "tf32" if precision == "default" and may_round else "tf32x3"


def _may_use_tf32() -> bool:
    """What torch was told for its own fp32 products. torch 2.9 refuses to say it in the old words
    where it was told in the new ones."""
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):
        return bool(settings.fp32_precision == "tf32")
    return settings.allow_tf32


def _scan(own: Tensor, transfers: Tensor, first: Tensor | None) -> Tensor:
    """The state that enters each segment: first, then S_next = S transfer + own, in turn.

    own, transfers: [B, H, segments, N, N].  first: [B, H, N, N] or None for zeros.
    """
    entering = torch.empty_like(own)
    S = torch.zeros_like(own[:, :, 0]) if first is None else first
    with without_autocast(own.device.type):
        for i in range(own.shape[2]):
            entering[:, :, i] = S
            S = S @ transfers[:, :, i] + own[:, :, i]
    return entering
