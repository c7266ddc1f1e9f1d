"""Low-rank adapters on the decoder of an alternating or LLaVA-OneVision model, by peft.

An adapter folder holds peft's own files, and
    trained.safetensors   what else has learned, such as the projector
    rwkvtune.json   the model that it belongs to
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rwkvtune.adapters.adapter import ABOUT_FILE, FORMAT, read_about
from rwkvtune.adapters.base import Base, base_from
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import UserError
from rwkvtune.files import atomic_directory

TRAINED_FILE = "trained.safetensors"


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


def save_lora(model: Any, folder: Path, base_path: str) -> None:
    """Write all that has learned in a model with adapters, and which model it belongs to.

    base_path: where that one lies.
    """
    inside = model.get_base_model()
    learned = {n: p for n, p in inside.named_parameters() if p.requires_grad and ".lora_" not in n}
    plain = {n.replace(".base_layer", ""): p.detach() for n, p in learned.items()}
    frozen = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in inside.state_dict().items()
        if name not in learned and ".lora_" not in name
    }
    base = base_from(frozen, inside.config.model_type, base_path)
    about = {"format": FORMAT, "adapter": {"kind": "lora"}, "base": dataclasses.asdict(base)}
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        save_weights(temporary / TRAINED_FILE, plain)
        (temporary / ABOUT_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")


def merged(model: Any) -> Any:
    """The model with its adapters added into its matrices; others come back as they are."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def merge_adapter(model: Any, folder: str | Path, path: str) -> Any:
    """The model of a path with a peft adapter of that folder merged in, and with what else had
    learned beside it.

    UserError when the folder holds none, or it is made for another model.
    """
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds no peft adapter: it has no adapter_config.json")
    about, learned = read_about(folder), dict[str, Tensor]()
    if about is not None:
        learned = load_weights(folder / TRAINED_FILE)
        frozen = {n: t for n, t in model.state_dict().items() if n not in learned}
        found = base_from(frozen, model.config.model_type, path)
        Base(**about["base"]).check(found, str(folder))
    try:
        plain = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        plain.load_state_dict(learned, strict=False)
        return plain
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter {folder} does not fit this model: {reason}") from error
