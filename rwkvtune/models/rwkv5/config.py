"""What an x052 model looks like, in numbers. No torch here: presets and `--help` read this file
too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rwkvtune.errors import UserError
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

__all__ = ["INITIAL_VALUE_TERMS", "TENSORS", "RWKV5Config", "config_from_shapes", "tensor_shapes"]


@dataclass(frozen=True)
class RWKV5Config:
    """Dimensions of an x052 (RWKV-5.2) model; dim_ffn left at 0 takes the published value."""

    vocab_size: int
    """Rows of the embedding and of the head; token ids are 0 .. vocab_size - 1."""
    n_layer: int
    n_embd: int
    """Width of the residual stream, a multiple of 32 and of `head_size`."""
    head_size: int = 64
    dim_ffn: int = 0
    """Width of the channel mix; 0 = 3.5 * n_embd, rounded down to 32."""

    def __post_init__(self) -> None:
        fill_in(self, {"dim_ffn": channel_width(self.n_embd)})

    @property
    def version(self) -> str:
        return "x052"

    @property
    def kernel(self) -> str:
        """Which of rwkvtune.kernels runs its recurrence."""
        return "wkv5"

    @property
    def num_heads(self) -> int:
        return self.n_embd // self.head_size

    @property
    def num_parameters(self) -> int:
        V, C, L = self.vocab_size, self.n_embd, self.n_layer
        return 2 * V * C + 4 * C + L * (14 * C + 6 * C * C + 2 * C * self.dim_ffn)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: 6 x this is a training step's FLOP per
        token."""
        V, C, L = self.vocab_size, self.n_embd, self.n_layer
        return V * C + L * (6 * C * C + 2 * C * self.dim_ffn)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> RWKV5Config:
    """Read every dimension from a checkpoint's tensor shapes; UserError names the tensor that is
    missing."""
    file = ShapeReader("x052", shapes)
    n_embd = file.size("emb.weight", 1)
    bonus = shapes.get("blocks.0.att.time_faaaa", (n_embd, 1))
    if len(bonus) != 2 or bonus[0] * bonus[1] != n_embd:
        raise UserError(
            f"att.time_faaaa has the shape {bonus}; x052 (RWKV-5.2) has one of heads x head size, "
            f"here {n_embd} in all. RWKV-5.0 and 5.1 are not trained by this version of rwkvtune"
        )
    return RWKV5Config(
        vocab_size=file.size("emb.weight", 0),
        n_layer=file.n_layer,
        n_embd=n_embd,
        head_size=file.size("blocks.0.att.time_faaaa", 1),
        dim_ffn=file.size("blocks.0.ffn.key.weight", 0),
    )


TENSORS = table_of(
    {
        "time_mix_k": (VECTOR, "d^r1"),
        "time_mix_v": (VECTOR, "d^r1 + 0.3 * r0"),
        "time_mix_r": (VECTOR, "d^(0.5 * r1)"),
        "time_mix_g": (VECTOR, "d^(0.5 * r1)"),
        "time_decay": (HEADS, "-6 + 5 * n^(0.7 + 1.3 * r0)"),
        "time_faaaa": (HEADS, "r0 * (1 - n) + 0.1 * ((i + 1) % 3 - 1)"),
        "receptance.weight": (SQUARE, "orth(1)"),
        "key.weight": (SQUARE, "orth(0.1)"),
        "value.weight": (SQUARE, "orth(1)"),
        "gate.weight": (SQUARE, "orth(0.1)"),
        "output.weight": (SQUARE, "0"),
    },
    {
        "time_mix_k": (VECTOR, "d^r1"),
        "time_mix_r": (VECTOR, "d^r1"),
        "key.weight": (("dim_ffn", "n_embd"), "orth(1)"),
        "receptance.weight": (SQUARE, "0"),
        "value.weight": (("n_embd", "dim_ffn"), "0"),
    },
)
"""Shape and initial value of every tensor; `model.py` sets the values, and INITIAL_VALUE_TERMS says
what the letters are."""


def tensor_shapes(config: RWKV5Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its name."""
    return shapes_from(TENSORS, config)
