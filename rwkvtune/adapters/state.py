"""State tuning: the WKV state that a text begins with, one [H, N, N] per block, as all that is
trained.

Orientation: [head, value channel, key channel] for every version, which is how RWKV-PEFT writes its
files `blocks.i.att.time_state`. The `rwkv` package keeps the state of x070 in this order too; its
class for x052 and x060 keeps the transposed one and turns the file's tensors itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import UserError
from rwkvtune.models.frame import LanguageModel

ORIENTATION = "head, value, key"
FILE = "state.pth"


def attach(model: LanguageModel) -> None:
    """Freeze a model and give it trainable initial states, zero as they are without them."""
    model.requires_grad_(False)
    c = model.config
    shape = c.n_embd // c.head_size, c.head_size, c.head_size
    device = model.emb.weight.device
    for i in range(len(model.blocks)):
        att = model.get_submodule(f"blocks.{i}.att")
        att.register_parameter("time_state", nn.Parameter(torch.zeros(shape, device=device)))


def names_of(model: LanguageModel) -> list[str]:
    """Keys of the states in a state dict of the model."""
    return [f"blocks.{i}.att.time_state" for i in range(len(model.blocks))]


def take(model: LanguageModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Let a model begin every text with the states of a file, orientation as above.

    UserError when they are not exactly one of the right shape for each block.
    """
    attach(model)
    wanted = {name: model.get_parameter(name) for name in names_of(model)}
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is no state of this model" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, needs {list(p.shape)}"
        for name, p in wanted.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    if problems:
        raise UserError(
            f"{source} holds no states for this model: {problems[0]}"
            + (f" ({len(problems)} problems)" if len(problems) > 1 else "")
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def load(path: Path) -> dict[str, Tensor]:
    """States from a file (.pth or .safetensors) or from an adapter folder of ours."""
    return load_weights(path / FILE if path.is_dir() else path)


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    save_weights(folder / FILE, tensors)
