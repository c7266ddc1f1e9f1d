"""Adapters on the decoder of an alternating or LLaVA-OneVision model, by peft.

An adapter folder holds peft's own files, and
    trained.safetensors   what else has learned, such as the projector
    rwkvtune.json   the model that it belongs to
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rwkvtune.adapters.adapter import ABOUT_FILE, FORMAT, read_about
from rwkvtune.adapters.base import Base, base_from
from rwkvtune.adapters.lora import peft_config, peft_package
from rwkvtune.adapters.quant import QuantReport, bitsandbytes_functional, dequantize, quantize
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import UserError
from rwkvtune.files import atomic_directory

TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True)
class Adapted:
    """A model with adapters on every matrix of its decoder's layers."""

    model: Any
    """peft's wrapper."""
    settings: AdapterSettings
    base: Base
    learned: frozenset[str]
    """Names of what else learns in the plain model, such as the projector."""
    quantized: QuantReport | None

    def save(self, folder: Path) -> None:
        """Write all that has learned, and which model it belongs to."""
        inside = self.model.get_base_model()
        plain = {
            name: parameter.detach()
            for key, parameter in inside.named_parameters()
            if (name := key.replace(".base_layer", "")) in self.learned
        }
        about = {
            "format": FORMAT,
            "adapter": dataclasses.asdict(self.settings),
            "base": dataclasses.asdict(self.base),
        }
        with atomic_directory(folder) as temporary:
            self.model.save_pretrained(temporary)
            save_weights(temporary / TRAINED_FILE, plain)
            (temporary / ABOUT_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")

    def merged(self) -> Any:
        """The plain model that answers as this one does; uses it up. A packed decoder counts with
        its rounded values."""
        dequantize(self.model)
        return self.model.merge_and_unload()


def check_packages(settings: AdapterSettings) -> None:
    """UserError where a package that these adapters need is missing."""
    peft_package()
    if settings.quant != "none":
        bitsandbytes_functional()


def adapt(
    model: Any, settings: AdapterSettings, base_path: str, *, dropout: float, bias: str
) -> Adapted:
    """Pack the decoder's matrices if settings.quant says so, and put adapters on them; only they
    learn then, and what already learns outside of the decoder.

    base_path: where the model lies.  bias: none, all or lora_only, as peft takes it.
    UserError where a package is missing.
    """
    targets = _matrices(model)
    biases = {f"{target}.bias" for target in targets}
    language_model = (model.get_decoder(), model.get_output_embeddings())
    language = {id(p) for part in language_model for p in part.parameters()}
    learned = {
        name
        for name, parameter in model.named_parameters()
        if (
            (parameter.requires_grad and id(parameter) not in language)
            or (bias == "all" and "bias" in name)
            or (bias == "lora_only" and name in biases)
        )
    }
    frozen = {n: t for n, t in model.state_dict().items() if n not in learned}
    base = base_from(frozen, model.config.model_type, base_path)
    report = None
    if settings.quant != "none":
        report = quantize(model, settings.quant, names=_any_of(targets))
    more = {f"{'miss' if settings.kind == 'miss' else 'lora'}_dropout": dropout, "bias": bias}
    config = peft_config(
        dataclasses.replace(settings, peft_config={"target_modules": targets, **more})
    )
    wrapped = peft_package().get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if name.replace(".base_layer", "") in learned:
            parameter.requires_grad_(True)
    return Adapted(wrapped, settings, base, frozenset(learned), report)


def merge_adapter(model: Any, folder: str | Path, path: str) -> Any:
    """The model of a path with a peft adapter of that folder merged in, and with what else had
    learned beside it.

    UserError when the folder holds none, or it is made for another model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds no peft adapter: it has no adapter_config.json")
    about, learned = read_about(folder), dict[str, Tensor]()
    if about is not None:
        learned = load_weights(folder / TRAINED_FILE)
        frozen = {n: t for n, t in model.state_dict().items() if n not in learned}
        found = base_from(frozen, model.config.model_type, path)
        Base(**about["base"]).check(found, str(folder))
        kind = AdapterSettings(**about["adapter"]).quant
        if kind != "none":
            quantize(model, kind, names=_any_of(_matrices(model)))
            dequantize(model)
    try:
        plain = peft_package().PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        plain.load_state_dict(learned, strict=False)
        return plain
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter {folder} does not fit this model: {reason}") from error


def _matrices(model: Any) -> list[str]:
    """Names of the projections in the decoder's layers."""
    within = set(model.get_decoder().modules())
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m in within]


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))
