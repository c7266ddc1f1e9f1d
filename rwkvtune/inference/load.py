"""From a weights file to a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rwkvtune.checkpoint import load_weights
from rwkvtune.models import build_model, config_from_state_dict, fill_model

if TYPE_CHECKING:
    from rwkvtune.models.frame import LanguageModel

IN_NO_PRODUCT = ("emb.weight", ".r_k", ".time_faaaa", ".time_decay")
"""How the names of parameters end that are matrices by their shape only."""


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The model of a weights file, in eval mode: dimensions from the tensors, values in fp32.

    path: a .pth or .safetensors file.
    dtype: torch.bfloat16 keeps the matrices of the products, nearly all of the model, in that type
    and computes as training with bf16 does.
    UserError when the file is no model that rwkvtune trains or lacks a tensor.
    """
    weights = load_weights(path)
    model = build_model(config_from_state_dict(weights), initial_values=False)
    prepare_matrices(model, dtype)
    fill_model(model, weights, str(path))
    return model.to(device).eval()


def prepare_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the still empty matrices of the products their type, and an order in memory that is fast
    for one token.

    Measured on a CPU with AVX512 and MKL, one token, fp32: with the inputs of each output apart
    instead of side by side, 1.6 times as fast at [3072, 768] and [65536, 768], 1.1 times at
    [768, 768], but slower at [768, 3072]; in bf16 slower everywhere. Many tokens: no difference.
    """
    for name, parameter in model.named_parameters():
        if parameter.squeeze().dim() < 2 or name.endswith(IN_NO_PRODUCT):
            continue
        rows, columns = parameter.shape[-2:]
        if dtype == torch.float32 and rows >= columns and name.endswith(".weight"):
            parameter.data = torch.empty(columns, rows).t()
        else:
            parameter.data = parameter.data.to(dtype)
