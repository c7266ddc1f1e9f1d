"""Configurations of the alternating models, under their published model_type names.

The decoders' are Qwen2's with the mask settings added; a LLaVA checkpoint has such a flat one, with
its mm_* fields. LLaVA-OneVision's, as transformers arranges them, hold one as text_config.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from rwkvtune.errors import UserError
from rwkvtune.models.alternating.masks import (
    DEFAULT_SCHEDULE,
    RULES,
    Rule,
    TextOnly,
    special_layers,
)
from rwkvtune.models.alternating.variants import Variant


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


LLAVA_FIELDS = (
    *("mm_vision_tower", "vision_tower_pretrained", "mm_projector_type", "mm_hidden_size"),
    *("mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type"),
    *("mm_resampler_type", "mm_spatial_pool_stride", "mm_spatial_pool_mode"),
    *("mm_spatial_pool_out_channels", "mm_newline_position", "image_aspect_ratio"),
    *("image_crop_resolution", "image_split_resolution", "tokenizer_padding_side"),
    *("tokenizer_model_max_length", "mm_tunable_parts", "mm_projector_lr", "mm_vision_tower_lr"),
    *("mm_use_im_start_end", "mm_use_im_patch_token", "use_mm_proj", "add_faster_video"),
    *("faster_token_stride", "use_pos_skipping", "pos_skipping_range", "delay_load"),
    "unfreeze_mm_vision_tower",
)
"""Fields of LLaVA's flat configuration beside Qwen2's; a composed configuration keeps them."""

TOWER_KEY = "mm_vision_config"
"""Where our flat configurations hold the tower's dimensions; LLaVA's only name it."""

PUBLISHED_TOWER = "google/siglip-so400m-patch14-384"
_PUBLISHED_TOWER_SIZES = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def tower_config(source: Mapping[str, Any] | None, name: str) -> SiglipVisionConfig:
    """The vision tower as LLaVA-OneVision uses it: without SigLIP's last layer and its head.

    source: the tower's own config.json (of a whole SigLIP or its vision part); None = the published
    tower's dimensions, if `name` is that. UserError for any other name.
    """
    if source is None:
        if PUBLISHED_TOWER.split("/")[1] not in name:
            raise UserError(
                f"the dimensions of the vision tower {name} are not known here: give its folder, "
                "with a config.json, by --vision_tower"
            )
        source = _PUBLISHED_TOWER_SIZES
    parts: Any = source
    source = dict(parts.get("vision_config", parts))
    sizes: dict[str, Any] = {k: source[k] for k in _PUBLISHED_TOWER_SIZES if k in source}
    missing = sorted(set(_PUBLISHED_TOWER_SIZES) - set(sizes) - {"image_size", "patch_size"})
    if missing:
        raise UserError(f"the vision tower {name} is no SigLIP: its config.json lacks {missing}")
    sizes["num_hidden_layers"] -= 1
    return SiglipVisionConfig(**sizes, vision_use_head=False)


def pinpoints(value: str | list[Any], view_size: int) -> list[list[int]]:
    """LLaVA's image_grid_pinpoints as [height, width] in pixels.

    value: "(1x1),...,(6x6)", in views; or [width, height] in pixels, as a list or its text.
    """
    if isinstance(value, str):
        cells = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)\s*x\s*(\d+)\)", value)]
        if len(cells) >= 2 and "..." in value:
            (w0, h0), (w1, h1) = cells[0], cells[-1]
            cells = [(w, h) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
        if cells:
            return [[h * view_size, w * view_size] for w, h in cells]
        try:
            given = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given = None
    else:
        given = value
    is_list = isinstance(given, list | tuple) and all(isinstance(p, list | tuple) for p in given)
    points = [list(point) for point in given] if is_list else []
    if not points or any(len(p) != 2 or not all(isinstance(n, int) for n in p) for p in points):
        raise UserError(
            f"image_grid_pinpoints is {value!r}: expected (1x1),...,(6x6) or [[width, height], ...]"
        )
    return [[h, w] for w, h in points]


def composed_config(
    text: Qwen2Config,
    vision: SiglipVisionConfig,
    variant: Variant,
    llava: Mapping[str, Any],
    *,
    image_token_id: int = 151646,
    video_token_id: int = 151647,
) -> LlavaOnevisionConfig:
    """LLaVA-OneVision of a decoder and a tower, with the fields of LLaVA's flat configuration.

    UserError for a projector that transformers does not have.
    """
    projector = llava.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise UserError(
            f"mm_projector_type={projector} is not supported: only LLaVA-OneVision's mlp2x_gelu"
        )
    aspect = llava.get("image_aspect_ratio") or "anyres_max_9"
    points = llava.get("image_grid_pinpoints") or "(1x1),...,(6x6)"
    config: LlavaOnevisionConfig = COMPOSED_CONFIGS[variant](
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        video_token_index=video_token_id,
        vision_aspect_ratio=aspect if aspect.startswith("anyres_max_") else "anyres_max_9",
        image_grid_pinpoints=pinpoints(points, int(vision.image_size)),  # type: ignore[arg-type]
        tie_word_embeddings=text.tie_word_embeddings,
    )
    for name in LLAVA_FIELDS:
        if name in llava:
            setattr(config, name, llava[name])
    return config


def with_rope_theta(values: dict[str, Any]) -> dict[str, Any]:
    """Also where programs look for it that are older than transformers 5."""
    rope = values.get("rope_parameters") or {}
    return values | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})


def flat_config(config: PretrainedConfig, variant: Variant) -> dict[str, Any]:
    """A composed configuration as LLaVA writes it, for export."""
    text = with_rope_theta(config.text_config.to_dict())
    for name in ("model_type", "architectures", "_name_or_path"):
        text.pop(name, None)
    names = {
        "alternating": ("llava_qwen_with_alternating_attn", "LlavaQwenWithAlternatingAttn"),
        "alternating_cross": (
            "llava_qwen_with_alternating_cross_attn",
            "LlavaQwenWithAlternatingCrossAttn",
        ),
        "base": ("llava_qwen", "LlavaQwen"),
    }
    model_type, class_name = names[variant]
    kept = {name: getattr(config, name) for name in LLAVA_FIELDS if hasattr(config, name)}
    defaults = {
        "mm_vision_tower": PUBLISHED_TOWER,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": config.vision_aspect_ratio,
    }
    return {
        **text,
        **defaults,
        **kept,
        "model_type": model_type,
        "architectures": [f"{class_name}ForCausalLM"],
        "image_grid_pinpoints": [[w, h] for h, w in config.image_grid_pinpoints],
        TOWER_KEY: config.vision_config.to_dict(),
        "tie_word_embeddings": config.tie_word_embeddings,
    }


for _config in (
    LlavaQwenWithAlternatingAttnConfig,
    LlavaQwenWithAlternatingCrossAttnConfig,
    LlavaQwenConfig,
    LlavaOnevisionWithAlternatingAttnConfig,
    LlavaOnevisionWithAlternatingCrossAttnConfig,
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
