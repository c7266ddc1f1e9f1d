"""Attention functions registered with transformers: one that splits a batch by modality, and one
that brings special layers to any decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rwkvtune.errors import UserError
from rwkvtune.models.alternating.masks import (
    DEFAULT_SCHEDULE,
    RULES,
    Split,
    special_layers,
    special_mask,
    with_generated,
)
from rwkvtune.models.alternating.variants import Variant

SPLIT = "split"
ANY_DECODER = "alternating_any_decoder"


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Split | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa; where the mask is a Split, one causal sdpa without a mask for each of its groups.

    query [B, H, T, D]; returns [B, T, H, D].  Keys beyond T (an unfilled static cache) are unused.
    """
    if not isinstance(attention_mask, Split):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    if len(attention_mask.groups) == 1:
        out, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)
        return out, None
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    for rows, positions in attention_mask.groups:
        part, _ = sdpa_attention_forward(
            module,
            query[rows].index_select(2, positions),
            key[rows].index_select(2, positions),
            value[rows].index_select(2, positions),
            None,
            **kwargs,
        )
        out[rows] = out[rows].index_copy(1, positions, part)
    return out, None


def any_decoder_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    modality_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa that ANDs the modality rule into the mask of special layers, built anew in each."""
    settings: _Enabled = module.config.alternating
    if settings.special[module.layer_idx]:
        num_queries, num_keys = query.shape[2], key.shape[2]
        ids = settings.modality_ids if modality_ids is None else modality_ids
        if ids is None:
            ids = query.new_zeros(query.shape[0], num_keys, dtype=torch.long)
        ids = with_generated(ids.repeat_interleave(query.shape[0] // ids.shape[0], 0), num_keys)
        mask = special_mask(settings.rule, ids, num_queries, q_offset=num_keys - num_queries)
        attention_mask = mask if attention_mask is None else mask & attention_mask
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


class _Enabled:
    def __init__(self, variant: Variant, special: tuple[bool, ...]) -> None:
        self.rule, self.special = RULES[variant], special
        self.modality_ids: Tensor | None = None


def enable_alternating(
    model: PreTrainedModel,
    variant: Variant,
    schedule: str | list[int] = DEFAULT_SCHEDULE,
) -> None:
    """Give special layers to a decoder of transformers that is no Qwen2, such as Mistral.

    The model then takes modality_ids [B, T] in its forward; for `generate`, which refuses unknown
    keywords, put them around the call with `modalities(model, ids)`. Saved, it is an ordinary
    checkpoint: enable it again after loading. UserError when the model has no attention interface.
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{type(model).__name__} has an attention of its own, without transformers' interface: "
            "alternating layers cannot be added to it"
        )
    AttentionInterface.register(ANY_DECODER, any_decoder_attention)
    AttentionMaskInterface.register(ANY_DECODER, sdpa_mask)
    # Not an attribute of the configuration's class: it must not be saved.
    special = special_layers(schedule, config.num_hidden_layers)
    object.__setattr__(config, "alternating", _Enabled(variant, special))
    model.set_attn_implementation(ANY_DECODER)


@contextmanager
def modalities(model: PreTrainedModel, modality_ids: Tensor) -> Iterator[None]:
    """Within this block the prompt of a model with `enable_alternating` has these modalities."""
    settings: _Enabled = model.config.get_text_config().alternating
    settings.modality_ids = modality_ids
    try:
        yield
    finally:
        settings.modality_ids = None


AttentionInterface.register(SPLIT, split_attention)
AttentionMaskInterface.register(SPLIT, sdpa_mask)
