"""Presets: what the released models look like, where their weights are, and recommended values.

from rwkvtune.configs import load_model_config
config = load_model_config("1.5b")
"""

from rwkvtune.configs.model_loader import (
    ModelConfig,
    list_available_models,
    load_model_config,
    print_model_info,
)

__all__ = ["ModelConfig", "list_available_models", "load_model_config", "print_model_info"]
