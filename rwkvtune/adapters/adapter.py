"""A frozen base with what is trained beside it: put together, taken up again, written and merged.

An adapter folder holds
    adapter_config.json, adapter_model.safetensors   peft's own format; or state.pth, upstream's
    rwkvtune.json   what it is, and the base that it belongs to
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvtune.adapters import lora, state
from rwkvtune.adapters.base import Base, base_of
from rwkvtune.adapters.quant import (
    BYTES_PER_VALUE,
    KINDS,
    PROJECTIONS,
    QuantReport,
    dequantize,
    quantize,
)
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_directory
from rwkvtune.models import ModelConfig, build_model
from rwkvtune.models.frame import LanguageModel
from rwkvtune.models.layers import Linear

ABOUT_FILE = "rwkvtune.json"
FORMAT = 1


@dataclass(frozen=True)
class Adapter:
    """What was put into a model."""

    settings: AdapterSettings
    base: Base
    tensors: tuple[str, ...]
    """Keys of the model's state dict that are not the base's: all that a run must save."""
    quantized: QuantReport | None

    def save(self, model: LanguageModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write an adapter folder, whole or not at all.

        tensors: the values of self.tensors, whole."""
        with atomic_directory(folder) as temporary:
            if self.settings.kind == "state":
                state.save(tensors, temporary)
            else:
                lora.save(model, self.settings, tensors, temporary, base_path=self.base.path)
            about = {
                "format": FORMAT,
                "adapter": dataclasses.asdict(self.settings),
                "base": dataclasses.asdict(self.base),
            }
            if self.settings.kind == "state":
                about["orientation"] = state.ORIENTATION
            (temporary / ABOUT_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Sizes:
    """What an adapter will take, known from dimensions and settings."""

    trained: int
    """Numbers that are trained."""
    frozen_bytes: int
    """Memory of the base."""


def sizes(
    config: ModelConfig, settings: AdapterSettings, compute_dtype: torch.dtype = torch.float32
) -> Sizes:
    """Try the settings on a model without values; UserError where `attach` would raise one."""
    with torch.device("meta"):
        model = build_model(config, initial_values=False)
        _wrap(model, settings, is_resumed=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = 0
    for name, module in model.named_modules():
        plain = re.sub(r"\.base_layer$", "", name)
        is_packed = settings.quant != "none" and re.fullmatch(PROJECTIONS, plain)
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                each = float(parameter.element_size())
                if type(module) is Linear and is_packed:
                    each = BYTES_PER_VALUE[KINDS[settings.quant]]
                elif type(module) is Linear and not settings.reads_base_weights:
                    each = compute_dtype.itemsize
                frozen += int(parameter.numel() * each)
    return Sizes(trained, frozen)


def attach(
    model: LanguageModel,
    settings: AdapterSettings,
    base_path: str,
    *,
    saved: Mapping[str, Tensor] | None = None,
    saved_base: Base | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Quantize a model that holds all weights of its base, then put the adapter in; the rest is
    frozen.

    saved: values of the trained tensors from an earlier run, by the names of the state dict; None =
    initial ones, random parts from torch's global generator.
    saved_base: what they belong to.
    compute_dtype: frozen projections are kept in this type, in which their products run.
    UserError when saved tensors or settings do not fit, or belong to another base.
    """
    assert not any(p.is_meta for p in model.parameters()), "load the base first"
    assert not any(".base_layer." in n for n in model.state_dict()), "quantize first, then wrap"
    names = set(model.state_dict())
    base = base_of(model, base_path)
    if saved_base is not None:
        saved_base.check(base, "the run's adapter")
    report = None if settings.quant == "none" else quantize(model, settings.quant)
    own = _wrap(model, settings, is_resumed=saved is not None)
    _account(model, names, own)
    if saved is not None:
        if set(saved) != set(own):
            differing = sorted(set(saved) ^ set(own))
            raise UserError(
                f"the saved adapter does not fit these settings: {differing[0]} is only in one of "
                f"the two ({len(differing)} such tensors)"
            )
        if settings.kind == "state":
            state.take(model, saved, "the saved adapter")
        else:
            lora.take(model, settings, saved)
    if not settings.reads_base_weights:
        store_frozen(model, compute_dtype)
    return Adapter(settings, base, own, report)


def _wrap(model: LanguageModel, settings: AdapterSettings, *, is_resumed: bool) -> tuple[str, ...]:
    """Put the adapter in; returns the keys of its tensors."""
    if settings.kind == "state":
        state.attach(model)
    else:
        lora.wrap(model, settings, is_resumed=is_resumed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _is_of_base(name):
            raise UserError(
                f"peft_config makes {name} of the base trainable, which no adapter file would "
                "hold: name its module in train_modules"
            )
    return tuple(name for name in model.state_dict() if not _is_of_base(name))


def merge(model: LanguageModel, base_path: str, folder: Path) -> LanguageModel:
    """The plain model, fp32, that answers as the base with the adapter of a folder; a quantized
    base counts with its rounded values. Uses `model` up.

    UserError for another base than the adapter's, and for a folder that is none.
    """
    settings = _checked(model, base_path, folder)
    if settings.quant != "none":
        quantize(model, settings.quant)
        dequantize(model)
    if settings.kind == "state":
        state.take(model, state.load(folder), str(folder))
        return model
    return lora.merged(model, folder)


def load(model: LanguageModel, base_path: str, folder: Path) -> LanguageModel:
    """The model with the adapter of a folder beside its weights, as it was trained; uses `model`
    up.

    UserError as in `merge`.
    """
    settings = _checked(model, base_path, folder)
    if settings.quant != "none":
        quantize(model, settings.quant)
    if settings.kind == "state":
        state.take(model, state.load(folder), str(folder))
        return model
    inside: LanguageModel = lora.put(model, folder).get_base_model()
    return inside


def _checked(model: LanguageModel, base_path: str, folder: Path) -> AdapterSettings:
    """The settings of a folder; UserError when the model is not its base, or it is no adapter."""
    about = read_about(folder)
    if about is None:
        if not (folder / lora.CONFIG_FILE).exists():
            raise MissingFileError(
                f"{folder} is no adapter folder: it has neither {ABOUT_FILE} nor {lora.CONFIG_FILE}"
            )
        return AdapterSettings("lora")  # what else it is, peft's own file says
    Base(**about["base"]).check(base_of(model, base_path), str(folder))
    return AdapterSettings(**about["adapter"])


def read_about(folder: Path) -> dict[str, Any] | None:
    """What an adapter folder says of itself; None for one that another program wrote.

    UserError when it is damaged, or of a later version.
    """
    path = folder / ABOUT_FILE
    if not path.exists():
        return None
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] == FORMAT:
            AdapterSettings(**about["adapter"])
            Base(**about["base"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: copy the folder again") from None
    if about["format"] != FORMAT:
        raise UserError(f"{path} has format {about['format']}, this version reads {FORMAT}")
    return about


def _is_of_base(name: str) -> bool:
    """Whether a key of a wrapped model's state dict holds the base's own values."""
    parts = name.split(".")
    return not {lora.NAME, *lora.INITIAL, "time_state"} & set(parts)


def _account(model: LanguageModel, names: set[str], own: tuple[str, ...]) -> None:
    """Every tensor of the base is still there, once and frozen, and nothing else but the
    adapter's."""
    found = []
    for name in model.state_dict():
        if _is_of_base(name):
            plain = re.sub(r"\.(base_layer|original_module)\b", "", name)
            module, _, last = plain.rpartition(".")
            if last in KINDS.values():
                plain = f"{module}.weight"
            if last != "scales":
                found.append(plain)
    assert sorted(found) == sorted(names), f"{sorted(set(found) ^ names)} got lost or doubled"
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in own), f"{name}: frozen means the base's"


def store_frozen(model: LanguageModel, dtype: torch.dtype) -> None:
    """Keep frozen projections in the type of their products: they would be rounded to it in every
    step, with the same result."""
    for module in model.modules():
        if type(module) is Linear and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)
