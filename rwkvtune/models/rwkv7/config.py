"""What an x070 model looks like, in numbers. No torch here: presets and `--help` read this file
too."""

from __future__ import annotations

from collections.abc import Mapping
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


UNUSED = frozenset(f"blocks.0.att.v{i}" for i in range(3))
"""Stored for upstream's sake, read by nothing: the first block makes the value that the others mix
in."""


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> RWKV7Config:
    """Read every dimension from a checkpoint's tensor shapes; UserError names the tensor that is
    missing."""
    numbers = (k.split(".")[1] for k in shapes if k.startswith("blocks."))
    layers = 1 + max(int(n) for n in numbers if n.isdecimal())
    last = f"blocks.{layers - 1}.att."  # the first block may lack v1

    def size(name: str, axis: int) -> int:
        if name not in shapes or len(shapes[name]) <= axis:
            raise UserError(
                f"these x070 weights lack {name} as a matrix (found {shapes.get(name)}): "
                "is the file complete?"
            )
        return shapes[name][axis]

    return RWKV7Config(
        vocab_size=size("emb.weight", 0),
        n_layer=layers,
        n_embd=size("emb.weight", 1),
        head_size=size("blocks.0.att.r_k", 1),
        dim_ffn=size("blocks.0.ffn.key.weight", 0),
        decay_rank=size(last + "w1", 1),
        a_rank=size(last + "a1", 1),
        v_rank=size(last + "v1", 1) if layers > 1 or last + "v1" in shapes else 0,
        g_rank=size(last + "g1", 1),
    )


_VECTOR = (1, 1, "n_embd")
_SQUARE = ("n_embd", "n_embd")

TENSORS: dict[str, tuple[tuple[str | int, ...], str]] = {
    "emb.weight": (("vocab_size", "n_embd"), "uniform(-1e-4, 1e-4)"),
    "blocks.0.ln0.weight": (("n_embd",), "1"),
    "blocks.0.ln0.bias": (("n_embd",), "0"),
    "blocks.*.ln1.weight": (("n_embd",), "1"),
    "blocks.*.ln1.bias": (("n_embd",), "0"),
    "blocks.*.att.x_r": (_VECTOR, "1 - d^(0.2 * r1)"),
    "blocks.*.att.x_w": (_VECTOR, "1 - d^(0.9 * r1)"),
    "blocks.*.att.x_k": (_VECTOR, "1 - d^(0.7 * r1)"),
    "blocks.*.att.x_v": (_VECTOR, "1 - d^(0.7 * r1)"),
    "blocks.*.att.x_a": (_VECTOR, "1 - d^(0.9 * r1)"),
    "blocks.*.att.x_g": (_VECTOR, "1 - d^(0.2 * r1)"),
    "blocks.*.att.w0": (_VECTOR, "-5.5 + 6 * n^(1 + r0^0.3) + 2.5 * z * abs(z)"),
    "blocks.*.att.w1": (("n_embd", "decay_rank"), "0"),
    "blocks.*.att.w2": (("decay_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
    "blocks.*.att.a0": (_VECTOR, "-0.19 + 0.3 * z * abs(z) + 0.4 * (n - 0.5)"),
    "blocks.*.att.a1": (("n_embd", "a_rank"), "0"),
    "blocks.*.att.a2": (("a_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
    "blocks.*.att.v0": (_VECTOR, "0.73 - 0.4 * (n - 0.5)"),
    "blocks.*.att.v1": (("n_embd", "v_rank"), "0"),
    "blocks.*.att.v2": (("v_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
    "blocks.*.att.g1": (("n_embd", "g_rank"), "0"),
    "blocks.*.att.g2": (("g_rank", "n_embd"), "orth(0.1 * max(1, sqrt(rows / columns)))"),
    "blocks.*.att.k_k": (_VECTOR, "0.71 - 0.1 * (n - 0.5)"),
    "blocks.*.att.k_a": (_VECTOR, "1.02"),
    "blocks.*.att.r_k": (("num_heads", "head_size"), "-0.04"),
    "blocks.*.att.receptance.weight": (_SQUARE, "orth(1)"),
    "blocks.*.att.key.weight": (_SQUARE, "orth(0.1)"),
    "blocks.*.att.value.weight": (_SQUARE, "orth(1)"),
    "blocks.*.att.output.weight": (_SQUARE, "0"),
    "blocks.*.att.ln_x.weight": (("n_embd",), "((1 + l) / L)^0.7"),
    "blocks.*.att.ln_x.bias": (("n_embd",), "0"),
    "blocks.*.ln2.weight": (("n_embd",), "1"),
    "blocks.*.ln2.bias": (("n_embd",), "0"),
    "blocks.*.ffn.x_k": (_VECTOR, "1 - d^(r1^4)"),
    "blocks.*.ffn.key.weight": (("dim_ffn", "n_embd"), "orth(1)"),
    "blocks.*.ffn.value.weight": (("n_embd", "dim_ffn"), "0"),
    "ln_out.weight": (("n_embd",), "1"),
    "ln_out.bias": (("n_embd",), "0"),
    "head.weight": (("vocab_size", "n_embd"), "orth(0.5 * max(1, sqrt(rows / columns)))"),
}
"""Shape (names of dimensions) and initial value of every tensor, in the order of RWKV-LM's
published table. `model.py` sets the values; INITIAL_VALUE_TERMS says what the letters are."""

INITIAL_VALUE_TERMS = (
    "i = channel, C = n_embd, N = head_size, l = layer, L = n_layer; d = i/C, n = i/(C-1), "
    "z = (i mod N - (N-1)/2) / ((N-1)/2), r0 = l/(L-1), r1 = 1 - l/L; "
    "orth(g) = a random orthogonal matrix, times g"
)


def tensor_shapes(config: RWKV7Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its name."""

    def numbers(shape: tuple[str | int, ...]) -> tuple[int, ...]:
        return tuple(n if isinstance(n, int) else getattr(config, n) for n in shape)

    return {
        name.replace("*", str(layer)): numbers(shape)
        for name, (shape, _) in TENSORS.items()
        for layer in (range(config.n_layer) if "*" in name else [0])
    }
