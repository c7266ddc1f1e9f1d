"""Models of every version to test, and how far their numbers are from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkvtune.models import CONFIG_CLASSES, ModelConfig, build_model, config_from_state_dict
from rwkvtune.models.frame import LanguageModel

VERSIONS = list(CONFIG_CLASSES)


def config_of(version: str, **sizes: int) -> ModelConfig:
    """A small model's dimensions, but for those that are given."""
    return CONFIG_CLASSES[version](**({"vocab_size": 31, "n_layer": 2, "n_embd": 64} | sizes))


def golden_model(path: Path) -> tuple[LanguageModel, dict[str, Tensor]]:
    """The model of a golden file, in fp32, and everything else in the file."""
    content = load_file(path)
    weights = {name[2:]: w.float() for name, w in content.items() if name.startswith("w.")}
    model = build_model(config_from_state_dict(weights))
    model.load_state_dict(weights)
    return model, content


def noisy_model(config: ModelConfig, seed: int = 0) -> Any:
    """Initial values plus noise everywhere, so that matrices that start at zero take part."""
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(B: int, T: int, vocab_size: int = 31, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def relative_errors(model: torch.nn.Module, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter: the largest error of its gradient over the largest value of the wanted one."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        name: float((gradients[name].double() - g).abs().max() / g.abs().max())
        for name, g in wanted.items()
        if name in gradients
    }


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).abs().max())
