"""What an x060 model looks like, in numbers. No torch here: presets and `--help` read this file
too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rwkvtune.models.dimensions import (
    HEADS,
    INITIAL_VALUE_TERMS,
    SQUARE,
    VECTOR,
    ShapeReader,
    channel_width,
    fill_in,
    shapes_from,
    table_of,
)

__all__ = ["INITIAL_VALUE_TERMS", "TENSORS", "RWKV6Config", "config_from_shapes", "tensor_shapes"]


@dataclass(frozen=True)
class RWKV6Config:
    """Dimensions of an x060 (RWKV-6.0) model; a width left at 0 takes the published value.

    The released model of width 4096 has twice the two low-rank widths, so for existing weights use
    `config_from_state_dict`, which reads every width from the tensors.
    """

    vocab_size: int
    """Rows of the embedding and of the head; token ids are 0 .. vocab_size - 1."""
    n_layer: int
    n_embd: int
    """Width of the residual stream, a multiple of 32 and of `head_size`."""
    head_size: int = 64
    dim_ffn: int = 0
    """Width of the channel mix; 0 = 3.5 * n_embd, rounded down to 32."""
    mix_rank: int = 0
    """A fifth of the columns of time_maa_w1 (mixes with the previous token); 0 = 32."""
    decay_rank: int = 0
    """Columns of time_decay_w1; 0 = 64."""

    def __post_init__(self) -> None:
        defaults = {"dim_ffn": channel_width(self.n_embd), "mix_rank": 32, "decay_rank": 64}
        fill_in(self, defaults)

    @property
    def version(self) -> str:
        return "x060"

    @property
    def kernel(self) -> str:
        """Which of rwkvtune.kernels runs its recurrence."""
        return "wkv6"

    @property
    def num_heads(self) -> int:
        return self.n_embd // self.head_size

    @property
    def mix_columns(self) -> int:
        """Columns of time_maa_w1: one low-rank mix for each of w, k, v, r, g."""
        return 5 * self.mix_rank

    @property
    def num_parameters(self) -> int:
        V, C, L = self.vocab_size, self.n_embd, self.n_layer
        low_rank = 2 * C * (self.mix_columns + self.decay_rank)
        return 2 * V * C + 4 * C + L * (16 * C + 6 * C * C + 2 * C * self.dim_ffn + low_rank)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: 6 x this is a training step's FLOP per
        token."""
        V, C, L = self.vocab_size, self.n_embd, self.n_layer
        low_rank = 2 * C * (self.mix_columns + self.decay_rank)
        return V * C + L * (6 * C * C + 2 * C * self.dim_ffn + low_rank)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> RWKV6Config:
    """Read every dimension from a checkpoint's tensor shapes; UserError names the tensor that is
    missing."""
    file = ShapeReader("x060", shapes)
    return RWKV6Config(
        vocab_size=file.size("emb.weight", 0),
        n_layer=file.n_layer,
        n_embd=file.size("emb.weight", 1),
        head_size=file.size("blocks.0.att.time_faaaa", 1),
        dim_ffn=file.size("blocks.0.ffn.key.weight", 0),
        mix_rank=file.size("blocks.0.att.time_maa_w1", 1) // 5,
        decay_rank=file.size("blocks.0.att.time_decay_w1", 1),
    )


TENSORS = table_of(
    {
        "time_maa_x": (VECTOR, "1 - d^r1"),
        "time_maa_w": (VECTOR, "1 - d^r1"),
        "time_maa_k": (VECTOR, "1 - d^r1"),
        "time_maa_v": (VECTOR, "1 - d^r1 - 0.3 * r0"),
        "time_maa_r": (VECTOR, "1 - d^(0.5 * r1)"),
        "time_maa_g": (VECTOR, "1 - d^(0.5 * r1)"),
        "time_maa_w1": (("n_embd", "mix_columns"), "0"),
        "time_maa_w2": ((5, "mix_rank", "n_embd"), "uniform(-0.01, 0.01)"),
        "time_decay": (VECTOR, "-6 + 5 * n^(0.7 + 1.3 * r0)"),
        "time_decay_w1": (("n_embd", "decay_rank"), "0"),
        "time_decay_w2": (("decay_rank", "n_embd"), "uniform(-0.01, 0.01)"),
        "time_faaaa": (HEADS, "r0 * (1 - n) + 0.1 * ((i + 1) % 3 - 1)"),
        "receptance.weight": (SQUARE, "orth(1)"),
        "key.weight": (SQUARE, "orth(0.1)"),
        "value.weight": (SQUARE, "orth(1)"),
        "gate.weight": (SQUARE, "orth(0.1)"),
        "output.weight": (SQUARE, "0"),
    },
    {
        "time_maa_k": (VECTOR, "1 - d^(r1^3)"),
        "time_maa_r": (VECTOR, "1 - d^(r1^3)"),
        "key.weight": (("dim_ffn", "n_embd"), "orth(1)"),
        "receptance.weight": (SQUARE, "0"),
        "value.weight": (("n_embd", "dim_ffn"), "0"),
    },
)
"""Shape and initial value of every tensor; `model.py` sets the values, and INITIAL_VALUE_TERMS says
what the letters are."""


def tensor_shapes(config: RWKV6Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its name."""
    return shapes_from(TENSORS, config)
