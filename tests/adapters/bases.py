"""Tiny bases whose every tensor matters to their logits."""

from __future__ import annotations

import torch

from rwkvtune.models import ModelConfig, RWKV5Config, RWKV6Config, RWKV7Config, build_model
from rwkvtune.models.frame import LanguageModel

CONFIGS: dict[str, ModelConfig] = {
    "x052": RWKV5Config(vocab_size=31, n_layer=2, n_embd=64, head_size=32),
    "x060": RWKV6Config(vocab_size=31, n_layer=2, n_embd=64, head_size=32),
    "x070": RWKV7Config(vocab_size=31, n_layer=2, n_embd=64, head_size=32),
}
IDS = torch.tensor([[3, 17, 0, 30, 5, 5, 5, 22, 9, 1, 28]])


def make_base(version: str = "x070", seed: int = 1) -> LanguageModel:
    """In eval mode."""
    model = build_model(CONFIGS[version], seed=seed)
    shake(model, seed, 0.05)
    return model.eval()


def shake(model: torch.nn.Module, seed: int, by: float) -> None:
    """Add noise to everything that is trainable."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
