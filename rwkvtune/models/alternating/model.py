"""Qwen2 with alternating attention, and LLaVA-OneVision around any Qwen2 decoder.

    import rwkvtune.models.alternating.model   # registers the published model_type names
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(input_ids, modality_ids=ids)         # ids [B, T]: 0 text, 1 visual; none = all text

B rows, T positions, V vocabulary, D width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaOnevisionForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from rwkvtune.errors import UserError
from rwkvtune.models.alternating.attention import SPLIT
from rwkvtune.models.alternating.config import (
    LlavaOnevisionWithAlternatingAttnConfig,
    LlavaOnevisionWithAlternatingCrossAttnConfig,
    LlavaQwenConfig,
    LlavaQwenWithAlternatingAttnConfig,
    LlavaQwenWithAlternatingCrossAttnConfig,
)
from rwkvtune.models.alternating.masks import (
    TEXT,
    VISUAL,
    Split,
    causal_mask,
    special_mask,
    split,
    with_generated,
)
from rwkvtune.models.alternating.packing import PackingRule, frame_features, image_features

IMAGE_TOKEN_INDEX = -200
"""Stands in input_ids for all tokens of one image or video."""
IGNORE_INDEX = -100
"""A label that does not count."""

ATTENTIONS = ("split", "sdpa", "eager")


@dataclass(frozen=True)
class LayerMasks:
    """The two masks of a forward pass; None = causal, without padding."""

    plain: Tensor | None
    special: Tensor | Split | None


class MaskedLayer(Qwen2DecoderLayer):
    """A Qwen2 layer that takes its own of two masks."""

    is_special: bool

    def forward(
        self, hidden_states: Tensor, attention_mask: LayerMasks | None = None, **kwargs: Any
    ) -> Any:
        masks = attention_mask
        mask = None if masks is None else masks.special if self.is_special else masks.plain
        return super().forward(hidden_states, attention_mask=mask, **kwargs)


class _OwnMasks:
    """What a class needs whose masks are not those that transformers would build."""

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **unused: Any) -> Any:
        """Generation with a static cache would prepare masks that know no modalities."""
        return attention_mask


class _SplitByDefault(_OwnMasks):
    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """`split` unless another is asked for."""
        name: str = super().get_correct_attn_implementation(  # type: ignore[misc]
            requested_attention or SPLIT, is_init_check
        )
        if name not in ATTENTIONS:
            raise UserError(
                f"attn_implementation={name} cannot follow the masks of alternating attention: "
                f"choose {', '.join(ATTENTIONS)}"
            )
        return name


class LlavaQwenWithAlternatingAttnModel(_SplitByDefault, Qwen2Model):
    """A Qwen2 decoder whose special layers see only what its configuration's rule allows."""

    config_class: Any = LlavaQwenWithAlternatingAttnConfig
    config: Any
    _no_split_modules = ["MaskedLayer"]

    def __init__(self, config: LlavaQwenWithAlternatingAttnConfig) -> None:
        super().__init__(config)
        if self.has_sliding_layers:
            raise UserError("no sliding windows in alternating attention: use_sliding_window=false")
        for layer, is_special in zip(self.layers, config.special_layers(), strict=True):
            layer.__class__ = MaskedLayer  # the same parameters: it differs in one argument
            layer.is_special = is_special  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen2Model's; modality_ids [B, T of the prompt], further positions are text."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("give input_ids or inputs_embeds")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        masks = self._masks(given, attention_mask, modality_ids, cache)
        return super().forward(
            input_ids=input_ids,
            attention_mask={"full_attention": masks},
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _masks(
        self,
        given: Tensor,
        attention_mask: Tensor | None,
        modality_ids: Tensor | None,
        cache: Any,
    ) -> LayerMasks:
        """Both masks, built once for all layers."""
        config, device = self.config, given.device
        batch, num_queries = given.shape[:2]
        seen: int | Tensor = 0
        num_keys = num_queries
        if cache is not None:
            seen = cache.get_seq_length()
            num_keys = cache.get_mask_sizes(num_queries, 0)[0]
        starts_here = int(seen) == 0
        is_padded = attention_mask is not None and not bool(attention_mask.all())
        padding = attention_mask if is_padded else None
        plain = None
        if padding is not None or not starts_here:
            plain = causal_mask(
                num_queries, num_keys, q_offset=seen, attention_mask=padding, device=device
            )
        if modality_ids is None:
            modality_ids = torch.full((batch, num_queries), TEXT, device=device)
        modality_ids = modality_ids.long()
        rule = config.rule()
        special: Tensor | Split | None
        can_split = config.text_only == "formula" and rule.splits
        if config._attn_implementation == SPLIT and can_split and starts_here:
            special = split(with_generated(modality_ids, num_queries), padding)
        else:
            special = special_mask(
                rule,
                with_generated(modality_ids, num_keys),
                num_queries,
                q_offset=seen,
                attention_mask=padding,
                text_only=config.text_only,
                legacy_decode_rows=config.legacy_decode_rows,
            )
        if config._attn_implementation == "eager":
            if plain is None:
                plain = causal_mask(num_queries, num_keys, device=device)
            assert isinstance(special, Tensor)
            return LayerMasks(_additive(plain, self.dtype), _additive(special, self.dtype))
        return LayerMasks(plain, special)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)


class LlavaQwenWithAlternatingCrossAttnModel(LlavaQwenWithAlternatingAttnModel):
    config_class = LlavaQwenWithAlternatingCrossAttnConfig


class LlavaQwenWithAlternatingAttnForCausalLM(_SplitByDefault, Qwen2ForCausalLM):
    """The language model alone: logits [B, T, V] from ids or embeddings and their modalities."""

    config_class: Any = LlavaQwenWithAlternatingAttnConfig
    decoder_class: type[Qwen2Model] = LlavaQwenWithAlternatingAttnModel
    _no_split_modules = ["MaskedLayer"]

    def __init__(self, config: LlavaQwenWithAlternatingAttnConfig) -> None:
        # Not Qwen2ForCausalLM's own, which would first build a stock decoder.
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        modality_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # Named here because `generate` refuses modality_ids, and counts no positions, where they
        # are not.
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            modality_ids=modality_ids,
            **kwargs,
        )


class LlavaQwenWithAlternatingCrossAttnForCausalLM(LlavaQwenWithAlternatingAttnForCausalLM):
    config_class = LlavaQwenWithAlternatingCrossAttnConfig
    decoder_class = LlavaQwenWithAlternatingCrossAttnModel


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    config_class = LlavaQwenConfig


class LlavaOnevisionWithModalities(_OwnMasks, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision around a plain or an alternating decoder.

    Takes transformers' own inputs (`pixel_values`, with a placeholder id for every visual token),
    or LLaVA's: one -200 in input_ids for each of `images`, which are packed here.

    images: [views, 3, S, S] each (a video: its frames), in the order of the -200 of all rows.
    image_sizes: (width, height) of each as it was.  modalities: "image", "video", or "text" for an
    entry that stands in for a row without images and has no -200.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.is_alternating = hasattr(config.text_config, "mask_schedule")
        self.loss_type = "ForCausalLM"  # transformers tells it by the names of its own classes

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        modality_ids: Tensor | None = None,
        images: list[Tensor] | None = None,
        image_sizes: Any = None,
        modalities: list[str] | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if images is not None:
            if input_ids is None or image_sizes is None:
                raise ValueError("images come with input_ids and image_sizes")
            spliced = self.splice(
                input_ids,
                images,
                image_sizes,
                modalities,
                attention_mask=attention_mask,
                labels=labels,
            )
            input_ids, image_sizes = None, None
            inputs_embeds, attention_mask = spliced.inputs_embeds, spliced.attention_mask
            modality_ids, labels = spliced.modality_ids, spliced.labels
        if self.is_alternating:
            if modality_ids is None and input_ids is not None:
                cache = kwargs.get("cache", kwargs.get("past_key_values"))
                if cache is not None and cache.get_seq_length():
                    raise ValueError("a cached step needs the modality_ids of the whole prompt")
                modality_ids = self.modality_ids(input_ids)
            kwargs["modality_ids"] = modality_ids
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            image_sizes=image_sizes,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            **kwargs,
        )

    def modality_ids(self, input_ids: Tensor) -> Tensor:
        """1 where an id stands for a visual token, [B, T]."""
        config = self.config
        is_visual = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
        ids: Tensor = is_visual.long()
        return ids

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers'; also from `images`, and then only the new ids come back."""
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        images = kwargs.pop("images", None)
        if images is not None:
            spliced = self.splice(
                inputs,
                images,
                kwargs.pop("image_sizes"),
                kwargs.pop("modalities", None),
                attention_mask=kwargs.pop("attention_mask", None),
                padding_side="left",
            )
            kwargs["inputs_embeds"] = spliced.inputs_embeds
            kwargs["attention_mask"] = spliced.attention_mask
            if self.is_alternating:
                kwargs["modality_ids"] = spliced.modality_ids
            return super().generate(**kwargs)
        if self.is_alternating and inputs is not None:
            # Once, for the whole prompt: a cached step sees only its new token.
            kwargs.setdefault("modality_ids", self.modality_ids(inputs))
        return super().generate(inputs, **kwargs)

    def packing_rule(self) -> PackingRule:
        return PackingRule.of(self.config)

    def visual_features(
        self, images: list[Tensor], image_sizes: list[tuple[int, int]], modalities: list[str]
    ) -> list[Tensor]:
        """The tokens of each image, [n, D]; none for modality "text"."""
        config: Any = self.config
        model, rule = self.model, self.packing_rule()
        seen = [i for i, modality in enumerate(modalities) if modality != "text"]
        empty = self.model.image_newline.new_empty(0, config.text_config.hidden_size)
        result = [empty] * len(images)
        if not seen:
            return result
        tower = model.vision_tower
        weight = next(tower.parameters())
        views = torch.cat([images[i] for i in seen]).to(weight.device, weight.dtype)
        needs_gradient = any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_gradient):
            hidden = tower(views, output_hidden_states=True).hidden_states
            hidden = hidden[config.vision_feature_layer]
        projected = model.multi_modal_projector(hidden)  # [views, tokens, D]
        parts = projected.split([len(images[i]) for i in seen])
        for i, part in zip(seen, parts, strict=True):
            if modalities[i] == "video":
                result[i] = frame_features(part, model.image_newline, rule)
            else:
                result[i] = image_features(part, image_sizes[i], model.image_newline, rule)
        return result

    def splice(
        self,
        input_ids: Tensor,
        images: list[Tensor],
        image_sizes: list[tuple[int, int]],
        modalities: list[str] | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str | None = None,
    ) -> Spliced:
        """Put the features of each image in the place of its -200 [B, T] -> [B, T'].

        Rows are cut to config.tokenizer_model_max_length and padded on the tokenizer's side.
        ValueError when the images do not agree in number with the placeholders.
        """
        modalities = modalities or ["image"] * len(images)
        features = self.visual_features(images, image_sizes, modalities)
        waiting = iter(f for f, m in zip(features, modalities, strict=True) if m != "text")
        num_images = sum(m != "text" for m in modalities)
        num_places = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        if num_images != num_places:
            raise ValueError(f"{num_images} images for {num_places} placeholders (-200)")
        keep = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
        embed = self.get_input_embeddings()
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        rows = []
        for ids, row_labels, row_keep in zip(input_ids, labels, keep.bool(), strict=True):
            ids, row_labels = ids[row_keep], row_labels[row_keep]
            places = (ids == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist()
            parts: list[tuple[Tensor, Tensor, int]] = []
            start = 0
            for place in [*places, len(ids)]:
                parts.append((embed(ids[start:place]), row_labels[start:place], TEXT))
                if place < len(ids):
                    image = next(waiting).to(parts[0][0].dtype)
                    parts.append((image, row_labels.new_full((len(image),), IGNORE_INDEX), VISUAL))
                start = place + 1
            kinds = [row_labels.new_full((len(e),), kind) for e, _, kind in parts]
            columns = [e for e, _, _ in parts], [l for _, l, _ in parts], kinds
            rows.append(tuple(torch.cat(column)[:limit] for column in columns))
        config: Any = self.config
        side: str = padding_side or str(getattr(config, "tokenizer_padding_side", "right"))

        def padded(column: int, value: float) -> Tensor:
            return nn.utils.rnn.pad_sequence(
                [row[column] for row in rows], True, value, padding_side=side
            )

        lengths = [row[1].new_ones(len(row[1])) for row in rows]
        mask = nn.utils.rnn.pad_sequence(lengths, True, 0, padding_side=side)
        return Spliced(padded(0, 0.0), mask, padded(1, IGNORE_INDEX), padded(2, TEXT))


@dataclass(frozen=True)
class Spliced:
    """What the decoder gets in the place of ids and images."""

    inputs_embeds: Tensor  # [B, T', D]
    attention_mask: Tensor  # [B, T'], 1 = no padding
    labels: Tensor  # [B, T']
    modality_ids: Tensor  # [B, T']


class LlavaOnevisionWithAlternatingAttn(LlavaOnevisionWithModalities):
    config_class = LlavaOnevisionWithAlternatingAttnConfig


class LlavaOnevisionWithAlternatingCrossAttn(LlavaOnevisionWithModalities):
    config_class = LlavaOnevisionWithAlternatingCrossAttnConfig


for _decoder, _lm, _composed in (
    (
        LlavaQwenWithAlternatingAttnModel,
        LlavaQwenWithAlternatingAttnForCausalLM,
        LlavaOnevisionWithAlternatingAttn,
    ),
    (
        LlavaQwenWithAlternatingCrossAttnModel,
        LlavaQwenWithAlternatingCrossAttnForCausalLM,
        LlavaOnevisionWithAlternatingCrossAttn,
    ),
):
    AutoModel.register(_decoder.config_class, _decoder, exist_ok=True)
    AutoModelForCausalLM.register(_lm.config_class, _lm, exist_ok=True)
    AutoModelForImageTextToText.register(_composed.config_class, _composed, exist_ok=True)
AutoModelForCausalLM.register(LlavaQwenConfig, LlavaQwenForCausalLM, exist_ok=True)
