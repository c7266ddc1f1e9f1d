"""Low-rank adapters on the decoder of an alternating or LLaVA-OneVision model, by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


def add_lora(model: Any, *, r: int, alpha: int, dropout: float, bias: Any) -> Any:
    """The model with adapters on every matrix of the decoder's layers, and only they (and what
    already learns outside of the decoder) learning."""
    from peft import LoraConfig, get_peft_model

    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    inside = "language_model." if hasattr(model.model, "language_model") else "model.layers."
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and inside in name
    ]
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, bias=bias, target_modules=targets
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if name in learns and inside not in name and not name.startswith("lm_head"):
            parameter.requires_grad_(True)
    return wrapped


def merged(model: Any) -> Any:
    """The model with its adapters added into its matrices; others come back as they are."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def merge_adapter(model: Any, folder: str | Path) -> Any:
    """The model with a peft adapter of that folder merged in.

    UserError when the folder holds none or it is made for other matrices.
    """
    from peft import PeftModel

    from rwkvtune.errors import UserError

    if not (Path(folder) / "adapter_config.json").exists():
        raise UserError(f"{folder} holds no peft adapter: it has no adapter_config.json")
    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter {folder} does not fit this model: {reason}") from error
