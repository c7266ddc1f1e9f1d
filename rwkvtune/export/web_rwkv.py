"""The `.st` files of web-rwkv and Ai00: safetensors in fp16, some names changed, the low-rank
matrices transposed.

Source: web-rwkv 3c7d546, assets/scripts/convert_safetensors.py and src/runtime/loader.rs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from rwkvtune.errors import UserError
from rwkvtune.models import ModelConfig

_TRANSPOSED = re.compile(r"\.att\.([wavg][12]|time_(mix|decay)_w[12])")
_RENAMED = {"time_faaaa": "time_first", "time_maa": "time_mix"}


def to_web_rwkv(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a model by web-rwkv's names, views of the same memory."""
    if config.version == "x070" and config.n_layer == 1:
        raise UserError(
            "web-rwkv reads a rank from the second block, so it cannot load a model of one layer: "
            "export to another format"
        )
    found = {}
    for name, tensor in weights.items():
        for ours, theirs in _RENAMED.items():
            name = name.replace(ours, theirs)
        found[name] = tensor.mT if _TRANSPOSED.search(name) else tensor
    return found


def from_web_rwkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by upstream's names."""
    is_x060 = "blocks.0.att.time_mix_w1" in tensors  # x052 has a time_mix of its own
    found = {}
    for theirs, tensor in tensors.items():
        name = theirs.replace("time_first", "time_faaaa")
        if is_x060:
            name = name.replace("time_mix", "time_maa")
        found[name] = tensor.mT if _TRANSPOSED.search(theirs) else tensor
    return found
