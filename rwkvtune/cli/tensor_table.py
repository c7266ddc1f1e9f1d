"""The table of a file's tensors: name, shape, comment and initialization, as RWKV-LM publishes it
for RWKV-7, blocks that are alike in one row."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from rwkvtune.models.rwkv7.config import UNUSED
from rwkvtune.training.groups import group_of
from rwkvtune.weights_header import TensorInfo

TensorText = Mapping[str, tuple[Sequence[str | int], str]]
"""A version's TENSORS: shape and initial value by name, with `*` for the number of a block."""


class Row(NamedTuple):
    name: str
    """With `*` for all blocks."""
    info: TensorInfo
    comment: str
    """Blocks that have it, `wdecay` or `lr 2x` as training does; empty = all, no decay, 1x."""
    initialization: str


def tensor_rows(tensors: Mapping[str, TensorInfo], known: TensorText) -> list[Row]:
    """One row per kind of tensor, in the order of `known`; names that it lacks at the end of their
    part."""
    layers_of: dict[tuple[str, TensorInfo, bool], list[int]] = {}
    for name, info in tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        kind = f"blocks.*.{block[2]}" if block else name
        layers = layers_of.setdefault((kind, info, name in UNUSED), [])
        if block:
            layers.append(int(block[1]))
    n_layer = 1 + max((n for layers in layers_of.values() for n in layers), default=-1)
    order = [name.replace("blocks.0.", "blocks.*.") for name in known]
    rows = []
    for (kind, info, is_unused), layers in layers_of.items():
        layers.sort()
        only_first = layers == [0] and (n_layer > 1 or kind not in known)
        name = kind.replace("*", "0") if only_first else kind
        comments = [_layers_comment(layers, n_layer, only_first)]
        if is_unused:
            comments.append("unused")
        elif kind in order or not known:
            comments.append(_training_comment(name, info.shape))
        else:
            comments.append("unknown")
        text = known.get(name) or known.get(kind)
        rows.append(Row(name, info, ", ".join(filter(None, comments)), text[1] if text else ""))
    place = {kind: i for i, kind in enumerate(order)}
    return sorted(
        rows,
        key=lambda row: (
            _part(row.name),
            place.get(re.sub(r"\.\d+\.", ".*.", row.name), len(order)),
        ),
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as an aligned Markdown table, an empty line between the parts; a column for the type
    where the file has several."""
    header = ["name", "shape", "comment", "initialization"]
    several = len({row.info.dtype for row in rows}) > 1
    lines: list[list[str]] = []
    for i, row in enumerate(rows):
        if i and _part(row.name) != _part(rows[i - 1].name):
            lines.append([""] * 4)
        lines.append([row.name, str(list(row.info.shape)), row.comment, row.initialization])
        if several:
            lines[-1].append(row.info.dtype)
    if several:
        header.append("dtype")
        lines = [line + [""] * (5 - len(line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width for width in widths]

    def joined(cells: Sequence[str]) -> str:
        return f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"

    return "\n".join(map(joined, [header, rule, *lines])) + "\n"


def _part(name: str) -> int:
    """Embedding, time mix, channel mix or head: the parts of the published table."""
    if name.startswith(("emb.", "blocks.0.ln0.", "blocks.*.ln0.")):
        return 0
    if re.match(r"blocks\.[\d*]+\.(ln2|ffn)\.", name):
        return 2
    return 1 if name.startswith("blocks.") else 3


def _layers_comment(layers: list[int], n_layer: int, only_first: bool) -> str:
    if only_first:
        return "for layer 0"
    if not layers or layers == list(range(n_layer)):
        return ""
    if layers == list(range(1, n_layer)):
        return "for layer 1+"
    return f"for layer {_ranges(layers)}"


def _ranges(numbers: Collection[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    ends: list[list[int]] = []
    for n in sorted(numbers):
        if ends and n == ends[-1][1] + 1:
            ends[-1][1] = n
        else:
            ends.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


def _training_comment(name: str, shape: tuple[int, ...]) -> str:
    group = group_of(name, shape, decays=True)
    return {"decay": "wdecay", "1x": ""}.get(group, f"lr {group}")
