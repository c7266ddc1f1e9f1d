"""What the configurations of all versions share: checks, tables of tensors, reading of shapes.

No torch here: presets, `inspect` and `--help` read these files too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from rwkvtune.errors import UserError


class Dimensions(Protocol):
    """What the configurations of all versions have; they are frozen dataclasses."""

    @property
    def version(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def dim_ffn(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def matmul_parameters(self) -> int: ...


Table = dict[str, tuple[tuple[str | int, ...], str]]
"""Name (* = any layer) -> shape, as names of dimensions, and initial value, as a formula."""

VECTOR = (1, 1, "n_embd")
SQUARE = ("n_embd", "n_embd")
HEADS = ("num_heads", "head_size")

INITIAL_VALUE_TERMS = (
    "i = channel, C = n_embd, N = head_size, l = layer, L = n_layer; d = i/C, n = i/(C-1), "
    "z = (i mod N - (N-1)/2) / ((N-1)/2), r0 = l/(L-1), r1 = 1 - l/L; "
    "orth(g) = a random orthogonal matrix, times g"
)


def table_of(att: Table, ffn: Table) -> Table:
    """A version's whole table from those of its time mix and channel mix, in the order of
    RWKV-LM's published one."""
    return {
        "emb.weight": (("vocab_size", "n_embd"), "uniform(-1e-4, 1e-4)"),
        "blocks.0.ln0.weight": (("n_embd",), "1"),
        "blocks.0.ln0.bias": (("n_embd",), "0"),
        "blocks.*.ln1.weight": (("n_embd",), "1"),
        "blocks.*.ln1.bias": (("n_embd",), "0"),
        **{f"blocks.*.att.{name}": entry for name, entry in att.items()},
        "blocks.*.att.ln_x.weight": (("n_embd",), "((1 + l) / L)^0.7"),
        "blocks.*.att.ln_x.bias": (("n_embd",), "0"),
        "blocks.*.ln2.weight": (("n_embd",), "1"),
        "blocks.*.ln2.bias": (("n_embd",), "0"),
        **{f"blocks.*.ffn.{name}": entry for name, entry in ffn.items()},
        "ln_out.weight": (("n_embd",), "1"),
        "ln_out.bias": (("n_embd",), "0"),
        "head.weight": (("vocab_size", "n_embd"), "orth(0.5 * max(1, sqrt(rows / columns)))"),
    }


def shapes_from(table: Table, config: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its name."""

    def numbers(shape: tuple[str | int, ...]) -> tuple[int, ...]:
        return tuple(n if isinstance(n, int) else getattr(config, n) for n in shape)

    return {
        name.replace("*", str(layer)): numbers(shape)
        for name, (shape, _) in table.items()
        for layer in (range(config.n_layer) if "*" in name else [0])
    }


SHOWN_MISFITS = 5


def misfits(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    unused: Collection[str],
) -> list[str]:
    """What a loader would refuse in a file's tensors, a line for each kind; axes of one do not
    count.

    unused: names that may be missing or of another shape.
    """

    def squeezed(shape: Iterable[int]) -> list[int]:
        return [n for n in shape if n != 1]

    missing = [name for name in expected if name not in shapes and name not in unused]
    unknown = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in expected]
    misshapen = [
        f"{name} {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and name not in unused and squeezed(shapes[name]) != squeezed(shape)
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    return [f"{kind}: {first_few(found)}" for kind, found in kinds.items() if found]


def first_few(items: Sequence[str]) -> str:
    more = len(items) - SHOWN_MISFITS
    return "; ".join(items[:SHOWN_MISFITS]) + (f"; and {more} more" if more > 0 else "")


def fill_in(config: Any, defaults: Mapping[str, int]) -> None:
    """Put defaults into the fields of a frozen configuration that are 0, and check them all.

    Raises UserError for dimensions that no model can have.
    """
    for name, value in defaults.items():
        if getattr(config, name) == 0:
            object.__setattr__(config, name, value)
    sizes = {f.name: getattr(config, f.name) for f in fields(config)}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1]
    if wrong:
        raise UserError(
            f"an {config.version} model needs positive dimensions, got {', '.join(wrong)}"
        )
    width, head = config.n_embd, config.head_size
    if width % head:
        raise UserError(
            f"n_embd={width} is not a multiple of head_size={head}: choose "
            f"n_embd={-(-width // head) * head} or another head_size"
        )


def channel_width(n_embd: int) -> int:
    """The published width of x052's and x060's channel mix: 3.5 times n_embd, rounded down to a
    multiple of 32, at least 32."""
    return max(32, 7 * n_embd // 64 * 32)


class ShapeReader:
    """The dimensions of a checkpoint, read from the shapes of its tensors."""

    def __init__(self, version: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.version, self.shapes = version, shapes
        numbers = (name.split(".")[1] for name in shapes if name.startswith("blocks."))
        self.n_layer = 1 + max(int(n) for n in numbers if n.isdecimal())

    def size(self, name: str, axis: int) -> int:
        """One side of a tensor; UserError names it when it is missing or has too few."""
        shape = self.shapes.get(name, ())
        if len(shape) <= axis:
            raise UserError(
                f"these {self.version} weights lack {name} as a matrix (found "
                f"{self.shapes.get(name)}): is the file complete?"
            )
        return shape[axis]
