"""Encoders of the true format that are small enough for tests and demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rwkvtune.models.vision.encoders import quiet_transformers


def tiny_siglip(
    *, side: int = 42, patch: int = 14, width: int = 32, layers: int = 2, seed: int = 0
) -> Any:
    """A SiglipVisionModel with random weights: (side // patch)^2 tokens per picture."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=max(1, width // 16),
                image_size=side,
                patch_size=patch,
            )
        )


def save_siglip(model: Any, folder: Path, *, side: int) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json, as on the hub."""
    from transformers import SiglipImageProcessorPil

    with quiet_transformers():
        model.save_pretrained(folder)
        size = {"height": side, "width": side}
        SiglipImageProcessorPil(size=size, resample=2).save_pretrained(folder)
