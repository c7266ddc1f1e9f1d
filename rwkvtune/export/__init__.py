"""Weights in the forms that other RWKV programs read, and back.

One file per format knows its names and layouts; `convert.py` reads any of them and writes any.
Nothing here imports torch: the command line's help reads the table.
"""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    """What a form of weights can hold."""

    readers: str
    suffix: str
    """Of the file's name; empty for a folder."""
    versions: tuple[str, ...]
    dtypes: tuple[str, ...]
    """That the matrices can be stored in, the first if the source's own is none of them."""


ALL_VERSIONS = ("x052", "x060", "x070")
FLOATS = ("fp32", "bf16", "fp16")

FORMATS = {
    "pth": Format("RWKV-LM, the rwkv package, rwkvtune", ".pth", ALL_VERSIONS, FLOATS),
    "safetensors": Format("rwkvtune", ".safetensors", ALL_VERSIONS, FLOATS),
    "hf": Format("transformers with flash-linear-attention", "", ("x070",), FLOATS),
    "gguf": Format("llama.cpp", ".gguf", ("x060", "x070"), (*FLOATS, "q8_0")),
    "st": Format("web-rwkv, Ai00", ".st", ALL_VERSIONS, ("fp16",)),
}
