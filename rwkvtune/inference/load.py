"""From a weights file to a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rwkvtune.checkpoint import load_weights
from rwkvtune.models import build_model, config_from_state_dict, fill_model

if TYPE_CHECKING:
    from rwkvtune.models.rwkv7.model import RWKV7


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> RWKV7:
    """The model of a .pth or .safetensors file: its dimensions from the tensors, fp32, in eval
    mode.

    UserError when the file is no x070 model or lacks a tensor.
    """
    weights = load_weights(path)
    with torch.device("meta"):  # no time for initial values that are overwritten at once
        model = build_model(config_from_state_dict(weights))
    model.to_empty(device=device)
    fill_model(model, weights, str(path))
    return model.eval()
