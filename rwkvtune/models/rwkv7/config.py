"""What an x070 model looks like, in numbers. No torch here: presets and `--help` read this file
too."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rwkvtune.errors import UserError


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
        for name, value in defaults.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        wrong = [
            f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) < 1
        ]
        if wrong:
            raise UserError(f"an x070 model needs positive dimensions, got {', '.join(wrong)}")
        if self.n_embd % self.head_size:
            raise UserError(
                f"n_embd={self.n_embd} is not a multiple of head_size={self.head_size}: choose "
                f"n_embd={-(-self.n_embd // self.head_size) * self.head_size} or another head_size"
            )

    @property
    def version(self) -> str:
        return "x070"

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
