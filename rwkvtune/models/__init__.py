"""Models: build one, or read its dimensions from weights.

weights = rwkvtune.checkpoint.load_weights("rwkv-final.pth")
model = build_model(config_from_state_dict(weights))
model.load_state_dict(weights)
logits, state = model(input_ids)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from rwkvtune.errors import UserError
from rwkvtune.models.rwkv5 import config as rwkv5_config
from rwkvtune.models.rwkv5.config import RWKV5Config
from rwkvtune.models.rwkv6 import config as rwkv6_config
from rwkvtune.models.rwkv6.config import RWKV6Config
from rwkvtune.models.rwkv7 import config as rwkv7_config
from rwkvtune.models.rwkv7.config import RWKV7Config

if TYPE_CHECKING:
    import torch

    from rwkvtune.models.frame import LanguageModel

__all__ = [
    "CONFIGS",
    "CONFIG_CLASSES",
    "KnownVersion",
    "ModelConfig",
    "RWKV5Config",
    "RWKV6Config",
    "RWKV7Config",
    "build_model",
    "config_from_shapes",
    "config_from_state_dict",
    "detect_version",
    "fill_model",
    "recognise_version",
]

ModelConfig = RWKV5Config | RWKV6Config | RWKV7Config
"""What a model looks like, in numbers; its `version` tells which one it is."""

CONFIGS = {"x052": rwkv5_config, "x060": rwkv6_config, "x070": rwkv7_config}
"""Version -> the module with its `config_from_shapes`, `tensor_shapes` and TENSORS."""

CONFIG_CLASSES: dict[str, type[ModelConfig]] = {
    "x052": RWKV5Config,
    "x060": RWKV6Config,
    "x070": RWKV7Config,
}


def build_model(
    config: ModelConfig, *, seed: int | None = None, initial_values: bool = True
) -> LanguageModel:
    """A model with its published initial values, fp32, on the current default device.

    seed: makes the random initial values repeatable on one kind of device, without touching torch's
    global generator; None draws from that generator.
    initial_values: False leaves all values unset, for weights that will be loaded over them.
    """
    import torch

    from rwkvtune.models.rwkv5.model import RWKV5
    from rwkvtune.models.rwkv6.model import RWKV6
    from rwkvtune.models.rwkv7.model import RWKV7

    model: LanguageModel
    if isinstance(config, RWKV5Config):
        model = RWKV5(config)
    elif isinstance(config, RWKV6Config):
        model = RWKV6(config)
    else:
        model = RWKV7(config)
    if initial_values:
        device = torch.get_default_device()  # a generator draws on its own kind of device only
        model.init_weights(None if seed is None else torch.Generator(device).manual_seed(seed))
    return model


class KnownVersion(NamedTuple):
    generation: str
    """RWKV-4, RWKV-5, ..."""
    version: str
    """As upstream's type names: x070, x060, ...; RWKV-4 has none."""
    evidence: str
    """The key of the first block that tells it."""
    nickname: str = ""

    def __str__(self) -> str:
        return f"{self.generation} {self.version}".rstrip()


def recognise_version(names: Collection[str]) -> KnownVersion:
    """Which RWKV a state dict belongs to, told by its keys, whether rwkvtune trains it or not.

    UserError for what is no RWKV at all.
    """
    att = {n.removeprefix("blocks.0.att.") for n in names if n.startswith("blocks.0.att.")}
    if "blocks.0.ffn.s_emb.weight" in names:
        return KnownVersion("RWKV-7", "x070a or later", "ffn.s_emb.weight")
    if {"r_k", "w0", "x_r"} <= att:
        return KnownVersion("RWKV-7", "x070", "att.r_k", "Goose")
    if "gate_w1" in att:
        return KnownVersion("RWKV-6", "x060a", "att.gate_w1")
    if "time_maa_rkvw_w1" in att:
        return KnownVersion("RWKV-6", "x060b or x060c", "att.time_maa_rkvw_w1")
    if "time_maa_x" in att and "time_state" in att:
        return KnownVersion("RWKV-6", "x060 with a tuned state", "att.time_state")
    if "time_maa_x" in att:
        return KnownVersion("RWKV-6", "x060", "att.time_maa_x", "Finch")
    if "time_faaaa" in att and "gate.weight" in att:
        return KnownVersion("RWKV-5", "x052", "att.time_faaaa and att.gate.weight", "Eagle")
    if att == {"time_state"}:
        return KnownVersion("a tuned state without its model", "", "att.time_state")
    if "time_first" in att and "ln_x.weight" in att:
        return KnownVersion("RWKV-5.0 or 5.1", "", "att.time_first and att.ln_x.weight")
    if "time_first" in att:
        return KnownVersion("RWKV-4", "", "att.time_first")
    sample = ", ".join(sorted(names)[:3]) or "no tensors at all"
    raise UserError(
        f"these weights are no RWKV that rwkvtune knows: expected keys such as emb.weight and "
        f"blocks.0.att.r_k, found {sample}"
    )


def detect_version(names: Collection[str]) -> str:
    """Tell which RWKV a state dict belongs to by its keys: "x052", "x060" or "x070".

    Raises UserError for versions that rwkvtune knows but does not train, and for what is no RWKV at
    all.
    """
    found = recognise_version(names)
    if found.version not in CONFIGS:
        raise UserError(
            f"these weights are {found} (they have {found.evidence}); this version of rwkvtune "
            "trains x052 (RWKV-5.2), x060 (RWKV-6) and x070 (RWKV-7)"
        )
    return found.version


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Read version and every dimension from the tensors' names and shapes; needs no torch."""
    config: ModelConfig = CONFIGS[detect_version(shapes)].config_from_shapes(shapes)
    return config


def config_from_state_dict(weights: Mapping[str, torch.Tensor]) -> ModelConfig:
    """Read version and every dimension from the tensors' names and shapes."""
    return config_from_shapes(
        {name.removeprefix("_forward_module."): tuple(w.shape) for name, w in weights.items()}
    )


def fill_model(
    model: LanguageModel, weights: Mapping[str, torch.Tensor], source: str, *, copy: bool = True
) -> None:
    """Give a model all of a file's weights, or raise one UserError that says which tensors do not
    fit.

    source: the file's name, for the message.
    copy: False = the tensors themselves, in their own types, become the model's parameters, so that
    those that are memory-mapped take no memory yet.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{source}: {name} holds {tensor.dtype}, which is no weight that can be trained or "
                "run; quantized files are not read, use the original in bf16, fp16 or fp32"
            )
    try:
        model.load_state_dict(dict(weights), assign=not copy)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        shown = " ".join(reasons[:3]) + (
            f" ... ({len(reasons)} in all)" if len(reasons) > 3 else ""
        )
        raise UserError(
            f"{source} does not fit an {model.config.version} model of its own dimensions: {shown}"
        ) from None
