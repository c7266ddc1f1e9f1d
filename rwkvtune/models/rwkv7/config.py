"""What an x070 model looks like, in numbers. No torch here: presets and `--help` read this file
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
    fill_in,
    shapes_from,
    table_of,
)

__all__ = [
    "INITIAL_VALUE_TERMS",
    "TENSORS",
    "UNUSED",
    "RWKV7Config",
    "SimpleTrainConfig",
    "config_from_shapes",
    "low_rank_width",
    "tensor_shapes",
]


def low_rank_width(size: float) -> int:
    """The published rounding of a low-rank width: the nearest multiple of 32, at least 32."""
    return max(32, int(round(size / 32) * 32))


@dataclass(frozen=True)
class RWKV7Config:
    """Dimensions of an x070 model; a width left at 0 takes the published value for `n_embd`.

    Source of the default widths: RWKV-LM, RWKV-v7/train_temp. Released checkpoints follow several
    older formulas, so for existing weights use `config_from_state_dict`, which reads every width
    from the tensors.
    """

    vocab_size: int
    """Rows of the embedding and of the head; token ids are 0 .. vocab_size - 1."""
    n_layer: int
    n_embd: int
    """Width of the residual stream, a multiple of 32 and of `head_size`."""
    head_size: int = 64
    dim_ffn: int = 0
    """Width of the channel mix; 0 = 4 * n_embd."""
    decay_rank: int = 0
    """Columns of w1; 0 = 2.5 * sqrt(n_embd), rounded to 32."""
    a_rank: int = 0
    """Columns of a1 (in-context learning rate); 0 = 2.5 * sqrt(n_embd), rounded to 32."""
    v_rank: int = 0
    """Columns of v1 (value residual); 0 = 1.7 * sqrt(n_embd), rounded to 32."""
    g_rank: int = 0
    """Columns of g1 (gate); 0 = 5 * sqrt(n_embd), rounded to 32."""

    def __post_init__(self) -> None:
        root = max(self.n_embd, 0) ** 0.5
        defaults = {
            "dim_ffn": 4 * self.n_embd,
            "decay_rank": low_rank_width(2.5 * root),
            "a_rank": low_rank_width(2.5 * root),
            "v_rank": low_rank_width(1.7 * root),
            "g_rank": low_rank_width(5 * root),
        }
        fill_in(self, defaults)

    @property
    def version(self) -> str:
        return "x070"

    @property
    def kernel(self) -> str:
        """Which of rwkvtune.kernels runs its recurrence."""
        return "wkv7"

    @property
    def num_heads(self) -> int:
        return self.n_embd // self.head_size

    @property
    def num_parameters(self) -> int:
        """All parameters, block 0's unused v0, v1, v2 included (RWKV-LM stores them too)."""
        V, C, L = self.vocab_size, self.n_embd, self.n_layer
        ranks = self.decay_rank + self.a_rank + self.v_rank + self.g_rank
        return 2 * V * C + 4 * C + L * (19 * C + 4 * C * C + 2 * C * self.dim_ffn + 2 * C * ranks)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: 6 x this is a training step's FLOP per
        token."""
        V, C, L = self.vocab_size, self.n_embd, self.n_layer
        ranks = self.decay_rank + self.a_rank + self.v_rank + self.g_rank
        unused = 2 * C * self.v_rank  # layer 0 makes the first value and mixes in none
        return V * C + L * (4 * C * C + 2 * C * self.dim_ffn + 2 * C * ranks) - unused


@dataclass(frozen=True)
class SimpleTrainConfig:
    """The dimensions of an x070 model under the names that rwkvtune's presets publish."""

    n_layer: int
    n_embd: int
    vocab_size: int
    head_size_a: int
    dim_att_lora: int
    """Columns of w1, and of a1 unless `dim_a_lora` says otherwise."""
    dim_gate_lora: int
    """Columns of g1."""
    dim_mv_lora: int
    """Columns of v1."""
    dim_a_lora: int = 0
    """Columns of a1; 0 = dim_att_lora, as in all released weights. Ours: published presets have no
    name for it."""
    dim_ffn: int = 0
    """Width of the channel mix; 0 = 4 * n_embd, as in all released weights. Ours too."""

    @classmethod
    def of(cls, model: RWKV7Config) -> SimpleTrainConfig:
        """The same dimensions; the two of ours are 0 where the published names say it all."""
        return cls(
            n_layer=model.n_layer,
            n_embd=model.n_embd,
            vocab_size=model.vocab_size,
            head_size_a=model.head_size,
            dim_att_lora=model.decay_rank,
            dim_gate_lora=model.g_rank,
            dim_mv_lora=model.v_rank,
            dim_a_lora=0 if model.a_rank == model.decay_rank else model.a_rank,
            dim_ffn=0 if model.dim_ffn == 4 * model.n_embd else model.dim_ffn,
        )

    def model_config(self) -> RWKV7Config:
        """UserError for dimensions that no model can have."""
        return RWKV7Config(
            vocab_size=self.vocab_size,
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            head_size=self.head_size_a,
            dim_ffn=self.dim_ffn,
            decay_rank=self.dim_att_lora,
            a_rank=self.dim_a_lora or self.dim_att_lora,
            v_rank=self.dim_mv_lora,
            g_rank=self.dim_gate_lora,
        )


UNUSED = frozenset(f"blocks.0.att.v{i}" for i in range(3))
"""Stored for upstream's sake, read by nothing: the first block makes the value that the others mix
in."""


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> RWKV7Config:
    """Read every dimension from a checkpoint's tensor shapes; UserError names the tensor that is
    missing."""
    file = ShapeReader("x070", shapes)
    last = f"blocks.{file.n_layer - 1}.att."  # the first block may lack v1
    return RWKV7Config(
        vocab_size=file.size("emb.weight", 0),
        n_layer=file.n_layer,
        n_embd=file.size("emb.weight", 1),
        head_size=file.size("blocks.0.att.r_k", 1),
        dim_ffn=file.size("blocks.0.ffn.key.weight", 0),
        decay_rank=file.size(last + "w1", 1),
        a_rank=file.size(last + "a1", 1),
        v_rank=file.size(last + "v1", 1) if file.n_layer > 1 or last + "v1" in shapes else 0,
        g_rank=file.size(last + "g1", 1),
    )


TENSORS = table_of(
    {
        "x_r": (VECTOR, "1 - d^(0.2 * r1)"),
        "x_w": (VECTOR, "1 - d^(0.9 * r1)"),
        "x_k": (VECTOR, "1 - d^(0.7 * r1)"),
        "x_v": (VECTOR, "1 - d^(0.7 * r1)"),
        "x_a": (VECTOR, "1 - d^(0.9 * r1)"),
        "x_g": (VECTOR, "1 - d^(0.2 * r1)"),
        "w0": (VECTOR, "-5.5 + 6 * n^(1 + r0^0.3) + 2.5 * z * abs(z)"),
        "w1": (("n_embd", "decay_rank"), "0"),
        "w2": (("decay_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
        "a0": (VECTOR, "-0.19 + 0.3 * z * abs(z) + 0.4 * (n - 0.5)"),
        "a1": (("n_embd", "a_rank"), "0"),
        "a2": (("a_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
        "v0": (VECTOR, "0.73 - 0.4 * (n - 0.5)"),
        "v1": (("n_embd", "v_rank"), "0"),
        "v2": (("v_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
        "g1": (("n_embd", "g_rank"), "0"),
        "g2": (("g_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
        "k_k": (VECTOR, "0.71 - 0.1 * (n - 0.5)"),
        "k_a": (VECTOR, "1.02"),
        "r_k": (HEADS, "-0.04"),
        "receptance.weight": (SQUARE, "orth(1)"),
        "key.weight": (SQUARE, "orth(0.1)"),
        "value.weight": (SQUARE, "orth(1)"),
        "output.weight": (SQUARE, "0"),
    },
    {
        "x_k": (VECTOR, "1 - d^(r1^4)"),
        "key.weight": (("dim_ffn", "n_embd"), "orth(1)"),
        "value.weight": (("n_embd", "dim_ffn"), "0"),
    },
)
"""Shape and initial value of every tensor; `model.py` sets the values, and
models.dimensions.INITIAL_VALUE_TERMS says what the letters are."""


def tensor_shapes(config: RWKV7Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its name."""
    return shapes_from(TENSORS, config)
