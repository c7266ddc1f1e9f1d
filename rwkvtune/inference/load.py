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
    """The model of a weights file: dimensions from the tensors, fp32, in eval mode.

    path: a .pth or .safetensors file.
    UserError when the file is no x070 model or lacks a tensor.
    """
    weights = load_weights(path)
    model = build_model(config_from_state_dict(weights), initial_values=False)
    fill_model(model, weights, str(path))
    return model.to(device).eval()
