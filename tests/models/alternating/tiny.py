"""Tiny models for the tests: the golden one of a closed form, and a random LLaVA-OneVision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, SiglipVisionConfig

from rwkvtune.models.alternating.config import COMPOSED_CONFIGS, DECODER_CONFIGS
from rwkvtune.models.alternating.model import (
    LlavaOnevisionWithAlternatingAttn,
    LlavaOnevisionWithAlternatingCrossAttn,
    LlavaOnevisionWithModalities,
)
from rwkvtune.models.alternating.variants import Variant

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "alternating_masks.json").read_text()
)
COMPOSED = {
    "alternating": LlavaOnevisionWithAlternatingAttn,
    "alternating_cross": LlavaOnevisionWithAlternatingCrossAttn,
    "base": LlavaOnevisionWithModalities,
}


def golden_model(variant: Variant, *, attention: str | None = None, **settings: Any) -> Any:
    """The golden model in fp32, parameters by its closed form."""
    sizes = dict(GOLDEN["tiny_model"]["config"])
    theta = sizes.pop("rope_theta")
    config = DECODER_CONFIGS[variant](
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    for name, value in settings.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for rank, (name, parameter) in enumerate(sorted(model.named_parameters())):
        phase = torch.arange(parameter.numel(), dtype=torch.float64) * 0.37 + rank
        value = 1 + 0.1 * phase.sin() if "norm" in name else 0.2 * phase.sin()
        parameter.data.copy_(value.view_as(parameter))
    return model.eval()


def golden_embeddings() -> Tensor:
    return (0.11 * torch.arange(12 * 16, dtype=torch.float64)).sin().view(1, 12, 16).float()


def composed_model(variant: Variant, *, seed: int = 0, **settings: Any) -> Any:
    """A decoder of 4 layers of width 32 behind a tower that sees 28 x 28 pixels as 2 x 2."""
    text = DECODER_CONFIGS[variant](
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    config = COMPOSED_CONFIGS[variant](
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=text,
        image_token_index=70,
        video_token_index=71,
        image_grid_pinpoints=[[28 * h, 28 * w] for h in (1, 2, 3) for w in (1, 2, 3)],
    )
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = COMPOSED[variant](config).eval()
    for parameter in model.parameters():  # the library's own spread hides what differs
        if parameter.dim() > 1:
            parameter.data.normal_(std=1 / math.sqrt(parameter[0].numel()))
    return model
