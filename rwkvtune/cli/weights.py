"""What the commands ask about a weights file before they load it."""

from __future__ import annotations

from pathlib import Path

from rwkvtune.errors import UserError
from rwkvtune.models import KnownVersion, recognise_version
from rwkvtune.weights_header import TensorInfo, WeightsHeader, read_header, weights_format

_SHORT = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def header_of(path: Path) -> WeightsHeader:
    """Names and shapes; by torch's own loader where only that reads the file, or says what is wrong
    with it."""
    header = read_header(path)
    if header is not None:
        return header
    from rwkvtune.checkpoint import load_weights

    tensors = {}
    for name, tensor in load_weights(path, verify=False).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = TensorInfo(tuple(tensor.shape), _SHORT.get(dtype, dtype))
    return WeightsHeader("legacy .pth" if weights_format(path) == "pickle" else ".pth", tensors)


def version_of(path: Path, header: WeightsHeader) -> KnownVersion:
    """Which RWKV a file holds; UserError that names the file when it is none."""
    if any(name.startswith("model.blocks.0.") for name in header.tensors):
        raise UserError(
            f"{path} is a resume state, not a weights file: give its run folder"
            + (f", {path.parents[2]}" if path.parent.parent.name == "resume" else "")
        )
    try:
        return recognise_version(header.tensors.keys())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
