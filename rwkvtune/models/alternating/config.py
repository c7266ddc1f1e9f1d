"""Configurations of the alternating models, under their published model_type names.

The decoders' are Qwen2's with the mask settings added; a LLaVA checkpoint has such a flat one, with
its mm_* fields. LLaVA-OneVision's, as transformers arranges them, hold one as text_config.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlavaOnevisionConfig, PretrainedConfig, Qwen2Config

from rwkvtune.models.alternating.masks import (
    DEFAULT_SCHEDULE,
    RULES,
    Rule,
    TextOnly,
    Variant,
    special_layers,
)


class MaskSettings:
    """What the configuration of a decoder says about its special layers."""

    variant = "alternating"
    mask_schedule: str | list[int] = DEFAULT_SCHEDULE
    """Which layers are special: see masks.special_layers."""
    mask_rule: list[list[bool]] | None = None
    """allowed[m_q][m_k]; None = the variant's own."""
    text_only: TextOnly = "formula"
    """Special layers of a row without visual tokens: follow the rule, or be causal."""
    legacy_decode_rows: bool = False
    """Repeat the original program's fault at decoding with a cache, with which published
    checkpoints were evaluated."""
    num_hidden_layers: int

    def rule(self) -> Rule:
        if self.mask_rule is None:
            return RULES[self.variant]
        return Rule(tuple(tuple(map(bool, row)) for row in self.mask_rule))

    def special_layers(self) -> tuple[bool, ...]:
        return special_layers(self.mask_schedule, self.num_hidden_layers)


class LlavaQwenWithAlternatingAttnConfig(MaskSettings, Qwen2Config):
    """Special layers see their own modality."""

    model_type = "llava_qwen_with_alternating_attn"


class LlavaQwenWithAlternatingCrossAttnConfig(MaskSettings, Qwen2Config):
    """Special layers see the other modality, and themselves."""

    model_type = "llava_qwen_with_alternating_cross_attn"
    variant = "alternating_cross"


class LlavaQwenConfig(Qwen2Config):
    """LLaVA's name for plain Qwen2."""

    model_type = "llava_qwen"


class LlavaOnevisionWithAlternatingAttnConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision around an alternating decoder, in transformers' arrangement."""

    model_type = "llava_onevision_with_alternating_attn"


class LlavaOnevisionWithAlternatingCrossAttnConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision around an alternating_cross decoder, in transformers' arrangement."""

    model_type = "llava_onevision_with_alternating_cross_attn"


DECODER_CONFIGS: dict[Variant, type[Qwen2Config]] = {
    "alternating": LlavaQwenWithAlternatingAttnConfig,
    "alternating_cross": LlavaQwenWithAlternatingCrossAttnConfig,
    "base": Qwen2Config,
}
COMPOSED_CONFIGS: dict[Variant, type[LlavaOnevisionConfig]] = {
    "alternating": LlavaOnevisionWithAlternatingAttnConfig,
    "alternating_cross": LlavaOnevisionWithAlternatingCrossAttnConfig,
    "base": LlavaOnevisionConfig,
}


def variant_of(model_type: str | None) -> Variant | None:
    """The variant that a model_type stands for; None for one that is not known."""
    if not model_type:
        return None
    name = model_type.lower()
    if "alternating_cross" in name:
        return "alternating_cross"
    return "alternating" if "alternating_attn" in name else "base"


def decoder_config(source: PretrainedConfig, variant: Variant, **settings: Any) -> Qwen2Config:
    """The configuration of a `variant` decoder with the dimensions of `source`, a Qwen2 one.

    settings: mask_schedule, mask_rule, text_only, legacy_decode_rows; those left out are kept where
    `source` has them.
    """
    values = source.to_dict()
    values.pop("model_type", None)
    values.pop("architectures", None)
    names = ("mask_schedule", "mask_rule", "text_only", "legacy_decode_rows")
    kept = {name: values.pop(name) for name in names if name in values}
    config = DECODER_CONFIGS[variant](**values)
    if variant != "base":
        for name, value in (kept | settings).items():
            setattr(config, name, value)
        config.special_layers()  # refuses a schedule that does not fit
    return config


for _config in (
    LlavaQwenWithAlternatingAttnConfig,
    LlavaQwenWithAlternatingCrossAttnConfig,
    LlavaQwenConfig,
    LlavaOnevisionWithAlternatingAttnConfig,
    LlavaOnevisionWithAlternatingCrossAttnConfig,
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
