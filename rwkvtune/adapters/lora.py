"""LoRA, rsLoRA, DoRA, PiSSA and MiSS through Hugging Face peft, put into our models in place.

In place, because then a model stays what it is: inputs_embeds, state and head reach it as ever, and
its blocks keep their names. What is saved is peft's own format, which PeftModel.from_pretrained
reads around one of our models.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkvtune.adapters.settings import ALPHA, LORA_KINDS, AdapterSettings, check_pattern
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.models.frame import LanguageModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""Names that peft gives them."""

NAME = "default"
"""Of the adapter inside peft's modules."""

INITIAL = ("initial_A", "initial_B")
"""Buffers of a PiSSA layer: the factors that were taken out of its base weight."""


def wrap(model: LanguageModel, settings: AdapterSettings, *, is_resumed: bool = False) -> None:
    """Put trainable layers around the projections of a loaded model and freeze everything else.

    is_resumed: the values will be loaded over it, so PiSSA takes no components out of the base;
    see `take`.
    UserError when a name or a field of peft_config fits nothing.
    """
    if isinstance(settings.target_modules, str):
        check_pattern(settings.target_modules)
    _check_modules(model, settings)
    config = peft_config(settings)
    if is_resumed and settings.kind == "pissa":
        config.init_lora_weights = True
    peft = peft_package()
    model.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            # peft tells of things that it only knows of transformers' models.
            warnings.filterwarnings("ignore", module="peft")
            peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"peft {settings.kind} does not fit this model: {reason} (its projections: "
            f"{', '.join(_last_names(model, nn.Linear))})"
        ) from error
    model.train(model.training)  # the new layers' dropout, too
    if _is_wrapped(model.head):
        raise UserError(
            f"lora_targets={settings.target_modules!r} takes in the head, whose product is made "
            "together with the loss: leave it out, or train it in full by --train_modules head"
        )
    if settings.kind == "pissa":
        layers = _lora_layers(model)
        most = min(min(layer.in_features, layer.out_features) for layer in layers)
        if settings.rank > most:
            raise UserError(
                f"lora_r={settings.rank}: the smallest matrix that pissa is to take components out "
                f"of has {most}: give {most} or less"
            )
        for layer in layers:
            for buffer, factor in zip(INITIAL, (layer.lora_A, layer.lora_B), strict=True):
                layer.register_buffer(buffer, factor[NAME].weight.detach().clone())


def peft_config(settings: AdapterSettings) -> Any:
    """peft's own configuration; UserError for a field that it does not have."""
    peft = peft_package()
    r = settings.rank
    common = {
        "target_modules": settings.target_modules,
        "modules_to_save": settings.modules_to_save,
    }
    if settings.kind in LORA_KINDS:
        alpha = settings.alpha or (r if settings.kind == "pissa" else ALPHA)
        kinds: dict[str, dict[str, Any]] = {
            "lora": {},
            "rslora": {"use_rslora": True},
            "dora": {"use_dora": True},
            "pissa": {"init_lora_weights": "pissa"},
        }
        fields = common | {"r": r, "lora_alpha": alpha} | kinds[settings.kind]
        made = peft.LoraConfig
    else:
        assert settings.kind == "miss", settings.kind
        fields = common | {"r": r}
        made = peft.MissConfig
    extra = dict(settings.peft_config)
    unknown = [name for name in extra if name not in made.__dataclass_fields__]
    if unknown:
        raise UserError(
            f"peft_config has {', '.join(unknown)}, which peft's {made.__name__} does not know; it "
            f"knows {', '.join(sorted(made.__dataclass_fields__))}"
        )
    try:
        return made(**(fields | extra))
    except (ValueError, TypeError) as error:
        raise UserError(f"peft_config={extra}: {error}") from error


def take(model: LanguageModel, settings: AdapterSettings, tensors: Mapping[str, Tensor]) -> None:
    """Give a model that was wrapped with is_resumed the values of its trained tensors, by the names
    of its state dict."""
    model.load_state_dict(dict(tensors), strict=False)
    if settings.kind == "pissa":
        for layer in _lora_layers(model):
            weight = layer.get_base_layer().weight
            # Written as peft writes it when it takes the components out, to get the same bits.
            weight.data = weight.data - layer.scaling[NAME] * layer.initial_B @ layer.initial_A


def save(
    model: LanguageModel,
    settings: AdapterSettings,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    base_path: str,
) -> None:
    """Write peft's two files into a folder.

    PiSSA becomes the LoRA of twice its rank that does the same to the untouched base, so whoever
    loads it needs no singular value decomposition.
    """
    config = peft_config(settings)
    own = {n: t for n, t in tensors.items() if not n.endswith(INITIAL)}
    if settings.kind == "pissa":
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        config.init_lora_weights = True
        for name in [n for n in tensors if n.endswith(INITIAL[0])]:
            layer = name.removesuffix(f".{INITIAL[0]}")
            a, b = f"{layer}.lora_A.{NAME}.weight", f"{layer}.lora_B.{NAME}.weight"
            own[a] = torch.cat([tensors[a], tensors[name]])
            own[b] = torch.cat([tensors[b], -tensors[f"{layer}.{INITIAL[1]}"]], dim=1)
    config.base_model_name_or_path = base_path
    config.inference_mode = True
    # Any other prefix would make peft's own loader find nothing, with a warning only.
    named = peft_package().get_peft_model_state_dict(
        model,
        state_dict=own,
        adapter_name=NAME,
        save_embedding_layers=False,  # True may look for the base on a model hub
    )
    config.save_pretrained(str(folder))
    save_weights(folder / WEIGHTS_FILE, {f"base_model.model.{n}": t for n, t in named.items()})


def merged(model: LanguageModel, folder: Path) -> LanguageModel:
    """The plain model that answers as `model` does with the adapter of a folder; uses `model` up.

    UserError as in `put`.
    """
    plain: LanguageModel = put(model, folder).merge_and_unload(safe_merge=True)
    return plain


def put(model: LanguageModel, folder: Path) -> Any:
    """peft's wrapper around a model, with the adapter of a folder in it, in the model's mode.

    UserError when the folder's tensors are not exactly those that its configuration asks for.
    """
    peft, is_training = peft_package(), model.training
    if not (folder / CONFIG_FILE).is_file():  # peft would look for it on a model hub
        raise MissingFileError(f"{folder} has no {CONFIG_FILE}: copy the folder again")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # ours is checked by its content, not its name
        wrapped = peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{folder} does not fit this base: {str(error).splitlines()[0]}") from error
    file = folder / WEIGHTS_FILE
    weights = load_weights(file)
    named = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    differing = sorted(named.keys() ^ weights.keys())
    if differing:
        raise UserError(
            f"{file} does not hold what its configuration says: {differing[0]} "
            + ("is missing" if differing[0] in named else "has no place")
            + f" ({len(differing)} such tensors)"
        )
    for name, tensor in weights.items():
        if tensor.shape != named[name].shape:
            raise UserError(
                f"{file} does not hold what its configuration says: {name} has shape "
                f"{list(tensor.shape)}, needs {list(named[name].shape)}"
            )
    peft.set_peft_model_state_dict(wrapped, weights)
    return wrapped.train(is_training)  # else its dropout would be on


def _check_modules(model: LanguageModel, settings: AdapterSettings) -> None:
    """UserError when a name in train_modules is no module, or holds targets itself."""
    modules = dict(model.named_modules())
    for wanted in settings.modules_to_save or []:
        fitting = [n for n in modules if n == wanted or n.endswith(f".{wanted}")]
        if not fitting:
            is_parameter = any(n.endswith(f".{wanted}") for n, _ in model.named_parameters())
            raise UserError(
                f"train_modules: {wanted} is "
                + ("a single tensor, not a module" if is_parameter else "not in this model")
                + f"; its modules are {', '.join(_last_names(model, nn.Module))}"
            )
        if any(isinstance(m, nn.Linear) for n in fitting for m in list(modules[n].modules())[1:]):
            raise UserError(
                f"train_modules: {wanted} holds the projections that the adapter is for; name the "
                "small modules, such as ln1,ln2,ln_x"
            )


def _last_names(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """The last parts of the names of all modules that hold tensors themselves."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, kind) and list(module.parameters(recurse=False)) and name
        }
    )


def _lora_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if NAME in getattr(m, "lora_A", {})]


def _is_wrapped(module: nn.Module) -> bool:
    return hasattr(module, "base_layer")


def peft_package() -> Any:
    """The package; UserError where it is missing."""
    # peft imports bitsandbytes, which warns that an optional package is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError(
            "peft needs the package of this name: pip install 'rwkvtune[peft]'"
        ) from error
    return peft
