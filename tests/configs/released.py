"""The released sizes as golden/presets.json and golden/x070-table.md have them."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PRESETS: dict[str, list[Any]] = json.loads((GOLDEN / "presets.json").read_text())
COLUMNS = PRESETS.pop("columns")
SIZES: dict[str, dict[str, Any]] = {
    name: dict(zip(COLUMNS, row, strict=True)) for name, row in PRESETS.items()
}


def published_tensors(size: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """RWKV-LM's table of the 1.5B's tensors, with the numbers of another size in its place."""
    C, att = size["n_embd"], size["dim_att_lora"]
    ranks = {"w": att, "a": att, "v": size["dim_mv_lora"], "g": size["dim_gate_lora"]}
    of_the_table = {2048: C, 8192: 4 * C, 65536: 65536, 1: 1}
    tensors: dict[str, tuple[int, ...]] = {}
    for row in (GOLDEN / "x070-table.md").read_text().splitlines()[2:]:
        name, shape, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        if not name:
            continue
        sides = [int(n) for n in re.findall(r"\d+", shape)]
        if name.endswith("r_k"):
            numbers = [C // 64, 64]
        else:
            low_rank = re.search(r"att\.([wavg])[12]$", name)
            numbers = [
                of_the_table[n] if n in of_the_table else ranks[low_rank[1]]  # type: ignore[index]
                for n in sides
            ]
        for layer in range(size["n_layer"]) if "*" in name else [0]:
            if layer > 0 or not re.search(r"att\.v[012]$", name):
                tensors[name.replace("*", str(layer))] = tuple(numbers)
    return tensors


def sparse_safetensors(path: Path, name: str) -> Path:
    """A bf16 file of a released model's true size whose data are one hole."""
    header, end = {}, 0
    for tensor, shape in published_tensors(SIZES[name]).items():
        begin, end = end, end + 2 * prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
