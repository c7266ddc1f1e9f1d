"""Models: build one, or read its dimensions from weights.

weights = rwkvtune.checkpoint.load_weights("rwkv-final.pth")
model = build_model(config_from_state_dict(weights))
model.load_state_dict(weights)
logits, state = model(input_ids)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rwkvtune.errors import UserError
from rwkvtune.models.rwkv7.config import RWKV7Config

if TYPE_CHECKING:
    import torch

    from rwkvtune.models.rwkv7.model import RWKV7

__all__ = ["RWKV7Config", "build_model", "config_from_state_dict", "detect_version", "fill_model"]


def build_model(
    config: RWKV7Config, *, seed: int | None = None, initial_values: bool = True
) -> RWKV7:
    """A model with its published initial values, fp32, on the current default device.

    seed: makes the random initial values repeatable on one kind of device, without touching torch's
    global generator; None draws from that generator.
    initial_values: False leaves all values unset, for weights that will be loaded over them.
    """
    import torch

    from rwkvtune.models.rwkv7.model import RWKV7

    model = RWKV7(config)
    if initial_values:
        device = torch.get_default_device()  # a generator draws on its own kind of device only
        model.init_weights(None if seed is None else torch.Generator(device).manual_seed(seed))
    return model


def detect_version(names: Mapping[str, object]) -> str:
    """Tell which RWKV a state dict belongs to by its keys: "x070".

    Raises UserError for versions that rwkvtune knows but does not train, and for what is no RWKV at
    all.
    """
    att = {n.removeprefix("blocks.0.att.") for n in names if n.startswith("blocks.0.att.")}
    if "blocks.0.ffn.s_emb.weight" in names:
        found = "RWKV-7 x070a or later (it has ffn.s_emb.weight)"
    elif {"r_k", "w0", "x_r"} <= att:
        return "x070"
    elif "gate_w1" in att:
        found = "RWKV-6 x060a (it has att.gate_w1)"
    elif "time_maa_rkvw_w1" in att:
        found = "RWKV-6 x060b or x060c (it has att.time_maa_rkvw_w1)"
    elif "time_maa_x" in att:
        found = "RWKV-6 x060 (it has att.time_maa_x)"
    elif "time_faaaa" in att and "gate.weight" in att:
        found = "RWKV-5 x052 (it has att.time_faaaa and att.gate.weight)"
    elif "time_first" in att:
        found = "RWKV-4 (it has att.time_first)"
    else:
        sample = ", ".join(sorted(names)[:3]) or "no tensors at all"
        raise UserError(
            f"these weights are no RWKV that rwkvtune knows: expected keys such as emb.weight and "
            f"blocks.0.att.r_k, found {sample}"
        )
    raise UserError(f"these weights are {found}; this version of rwkvtune trains x070 (RWKV-7)")


def config_from_state_dict(weights: Mapping[str, torch.Tensor]) -> RWKV7Config:
    """Read version and every dimension from the tensors' names and shapes."""
    from rwkvtune.models.rwkv7.model import x070_config

    names = {name.removeprefix("_forward_module."): w for name, w in weights.items()}
    detect_version(names)
    return x070_config({name: tuple(w.shape) for name, w in names.items()})


def fill_model(model: RWKV7, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Give a model all of a file's weights, or raise one UserError that says which tensors do not
    fit.

    source: the file's name, for the message.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{source}: {name} holds {tensor.dtype}, which is no weight that can be trained or "
                "run; quantized files are not read, use the original in bf16, fp16 or fp32"
            )
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        shown = " ".join(reasons[:3]) + (
            f" ... ({len(reasons)} in all)" if len(reasons) > 3 else ""
        )
        raise UserError(
            f"{source} does not fit an x070 model of its own dimensions: {shown}"
        ) from None
