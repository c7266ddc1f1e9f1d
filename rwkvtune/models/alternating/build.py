"""From a checkpoint's config.json to a model without weights yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig
from transformers.initialization import no_init_weights

from rwkvtune.errors import UserError
from rwkvtune.models.alternating.config import (
    LLAVA_FIELDS,
    TOWER_KEY,
    composed_config,
    decoder_config,
    tower_config,
)
from rwkvtune.models.alternating.model import (
    LlavaOnevisionWithAlternatingAttn,
    LlavaOnevisionWithAlternatingCrossAttn,
    LlavaOnevisionWithModalities,
    LlavaQwenWithAlternatingAttnForCausalLM,
    LlavaQwenWithAlternatingCrossAttnForCausalLM,
)
from rwkvtune.models.alternating.variants import Variant

_DECODERS: dict[Variant, Any] = {
    "alternating": LlavaQwenWithAlternatingAttnForCausalLM,
    "alternating_cross": LlavaQwenWithAlternatingCrossAttnForCausalLM,
    "base": Qwen2ForCausalLM,
}
_COMPOSED: dict[Variant, Any] = {
    "alternating": LlavaOnevisionWithAlternatingAttn,
    "alternating_cross": LlavaOnevisionWithAlternatingCrossAttn,
    "base": LlavaOnevisionWithModalities,
}
_NOT_QWENS = frozenset(
    {"text_config", "vision_config", "model_type", "architectures", "quantization_config"}
)


def composed_class(variant: Variant) -> Any:
    return _COMPOSED[variant]


def config_of(
    raw: Mapping[str, Any],
    variant: Variant,
    *,
    tower: Mapping[str, Any] | None,
    tower_name: str,
    llava: Mapping[str, Any],
    mask_settings: Mapping[str, Any],
) -> Any:
    """The configuration of a `variant` model with the dimensions of a config.json.

    raw: flat (LLaVA, Qwen2, Mistral) or transformers' LLaVA-OneVision.  tower: config.json of the
    vision tower, if there is one.  llava: fields that win over raw's.
    """
    merged = {**raw, **llava}
    if "vision_config" in raw:
        vision = SiglipVisionConfig(**{**raw["vision_config"]})
        text = decoder_config(_qwen2(raw["text_config"]), variant, **mask_settings)
        merged.setdefault("image_aspect_ratio", raw.get("vision_aspect_ratio"))
        points = raw.get("image_grid_pinpoints")
        if "image_grid_pinpoints" not in llava and points:
            merged["image_grid_pinpoints"] = [[w, h] for h, w in points]
        ids = {
            "image_token_id": raw.get("image_token_index", 151646),
            "video_token_id": raw.get("video_token_index", 151647),
        }
        return composed_config(text, vision, variant, merged, **ids)
    own = {k: v for k, v in raw.items() if k not in (*LLAVA_FIELDS, TOWER_KEY)}
    text = decoder_config(_qwen2(own), variant, **mask_settings)
    if not tower_name:
        return text
    vision = (
        SiglipVisionConfig(**raw[TOWER_KEY])
        if TOWER_KEY in raw
        else tower_config(tower, tower_name)
    )
    return composed_config(text, vision, variant, merged)


def _qwen2(values: Mapping[str, Any]) -> Qwen2Config:
    kept = {name: value for name, value in values.items() if name not in _NOT_QWENS}
    if str(values.get("model_type")).startswith("mistral"):
        kept |= {"use_sliding_window": False, "layer_types": None}
    kept.pop("image_grid_pinpoints", None)
    try:
        return Qwen2Config(**kept)
    except Exception as error:  # the library's validation has several types
        reason = " ".join(str(error).split())
        raise UserError(f"config.json is no Qwen2 configuration: {reason}") from error


def empty_model(
    config: Any, *, attention: str | None, dtype: torch.dtype, initial_values: bool
) -> Any:
    """A model of a configuration of `config_of`; without initial values its tensors hold
    anything."""
    is_composed = hasattr(config, "vision_config")
    text = config.text_config if is_composed else config
    variant: Variant = getattr(text, "variant", "base")
    kind = (_COMPOSED if is_composed else _DECODERS)[variant]
    if attention is not None:
        choice = attention
        if variant == "base" and attention == "split":
            choice = "sdpa"  # there is nothing to split
        text._attn_implementation = choice
        if not is_composed:
            config._attn_implementation = choice
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if initial_values:
            return kind(config)
        with no_init_weights():
            model = kind(config)
        model.tie_weights()
        return model
    finally:
        torch.set_default_dtype(before)


def generation_settings(model: Any) -> dict[str, Any]:
    """generation_config.json of a model."""
    values: dict[str, Any] = model.generation_config.to_diff_dict()
    return values
