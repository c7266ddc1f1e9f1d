"""Witness: the original program's logits for a tiny model, and transformers' own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2ForCausalLM,
)

from rwkvtune.errors import UserError
from rwkvtune.models.alternating.attention import enable_alternating, modalities
from rwkvtune.models.alternating.config import DECODER_CONFIGS, decoder_config
from rwkvtune.models.alternating.variants import Variant

from .tiny import GOLDEN, composed_model, golden_embeddings, golden_model

ALTERNATING: list[Variant] = ["alternating", "alternating_cross"]
TINY = GOLDEN["tiny_model"]
IDS = torch.tensor([GOLDEN["modality_ids"]])
# The golden logits have 6 decimals.
EXACT: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0}


def logits_of(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    return out


def new_embedding() -> Tensor:
    return (0.05 * torch.arange(16, dtype=torch.float64)).sin().float().view(1, 1, 16)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "split"])
@pytest.mark.parametrize("variant", ALTERNATING)
def test_logits_are_the_originals_with_every_attention(variant: Variant, attention: str) -> None:
    model = golden_model(variant, attention=attention)
    assert model.config._attn_implementation == attention
    logits = logits_of(model, inputs_embeds=golden_embeddings(), modality_ids=IDS)
    torch.testing.assert_close(logits[0], torch.tensor(TINY["logits"][variant]), **EXACT)


def test_text_alone_makes_within_layers_causal_and_so_does_a_schedule_without_special_layers() -> (
    None
):
    expected = torch.tensor(TINY["logits"]["base_causal"])
    embeddings = golden_embeddings()
    for model, inputs in (
        (golden_model("alternating"), {}),
        (golden_model("alternating"), {"modality_ids": torch.zeros_like(IDS)}),
        (golden_model("alternating_cross", mask_schedule="none"), {"modality_ids": IDS}),
        (golden_model("alternating_cross", text_only="causal"), {}),
    ):
        logits = logits_of(model, inputs_embeds=embeddings, **inputs)
        torch.testing.assert_close(logits[0], expected, **EXACT)
    stock = golden_model("base")
    assert type(stock) is Qwen2ForCausalLM
    torch.testing.assert_close(logits_of(stock, inputs_embeds=embeddings)[0], expected, **EXACT)


@pytest.mark.parametrize("variant", ALTERNATING)
def test_a_cached_step_gives_the_full_forwards_logits_or_the_originals(variant: Variant) -> None:
    decode = TINY["decode"][variant]
    full = torch.tensor(decode["full_forward_last_logits"])
    originals = torch.tensor(decode["reference_cached_last_logits"])
    both = torch.cat([golden_embeddings(), new_embedding()], dim=1)
    model = golden_model(variant)
    logits = logits_of(model, inputs_embeds=both, modality_ids=IDS)
    torch.testing.assert_close(logits[0, -1], full, **EXACT)
    for legacy, expected in ((False, full), (True, originals)):
        model = golden_model(variant, legacy_decode_rows=legacy)
        with torch.no_grad():
            start = model(inputs_embeds=golden_embeddings(), modality_ids=IDS, use_cache=True)
            step = model(inputs_embeds=new_embedding(), modality_ids=IDS, cache=start.cache)
        torch.testing.assert_close(step.logits[0, -1], expected, **EXACT)


@pytest.mark.parametrize("variant", ALTERNATING)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "split"])
def test_padding_on_either_side_changes_no_logits(variant: Variant, attention: str) -> None:
    model = golden_model(variant, attention=attention)
    alone = [golden_embeddings()[:, :n] for n in (12, 8)]
    expected = [
        logits_of(model, inputs_embeds=e, modality_ids=IDS[:, : e.shape[1]])[0] for e in alone
    ]
    for side in ("left", "right"):
        pad = (4, 0) if side == "left" else (0, 4)
        keep = torch.stack([torch.ones(12), torch.nn.functional.pad(torch.ones(8), pad)]).long()
        ids = torch.cat([IDS, torch.nn.functional.pad(IDS[:, :8], pad)])
        short = torch.nn.functional.pad(alone[1], (0, 0, *pad), value=9.0)
        batch = torch.cat([alone[0], short])
        logits = logits_of(model, inputs_embeds=batch, modality_ids=ids, attention_mask=keep)
        for row in range(2):
            # fp32, sums in another order
            torch.testing.assert_close(
                logits[row][keep[row].bool()], expected[row], atol=5e-6, rtol=0.0
            )


@pytest.mark.parametrize("variant", ALTERNATING)
def test_generation_is_the_same_with_a_dynamic_a_static_or_no_cache_and_with_beams(
    variant: Variant,
) -> None:
    model = golden_model(variant)
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 12))
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "modality_ids": IDS.repeat(2, 1),
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 99,
    }
    inputs["attention_mask"][1, :3] = 0
    for beams in (1, 3):
        uncached = model.generate(**inputs, num_beams=beams, use_cache=False)
        for cache in ("dynamic", "static"):
            cached = model.generate(**inputs, num_beams=beams, cache_implementation=cache)
            assert torch.equal(cached, uncached), (beams, cache)


def test_attention_weights_are_zero_exactly_where_the_golden_masks_forbid() -> None:
    for variant, name in (("alternating", "within"), ("alternating_cross", "cross")):
        model = golden_model(variant, attention="eager")  # type: ignore[arg-type]
        with torch.no_grad():
            out = model(inputs_embeds=golden_embeddings(), modality_ids=IDS, output_attentions=True)
        assert len(out.attentions) == 5
        for layer, weights in zip(GOLDEN["per_layer"]["5"][variant], out.attentions, strict=True):
            mask = GOLDEN["masks"][name if layer["mask"] != "causal" else "causal"]
            seen = (weights[0].amax(0) > 0).int().tolist()
            assert ["".join(map(str, row)) for row in seen] == mask


def test_gradients_are_the_same_with_every_attention_and_with_checkpointing() -> None:
    ids = torch.cat([IDS, 1 - IDS])
    embeddings = golden_embeddings().repeat(2, 1, 1)
    gradients = []
    for attention, checkpointing in (("eager", False), ("sdpa", False), ("split", True)):
        model = golden_model("alternating", attention=attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(inputs_embeds=embeddings, modality_ids=ids).logits.square().mean().backward()
        gradients.append([p.grad for p in model.model.layers.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_saved_model_comes_back_through_the_auto_classes(tmp_path: Any) -> None:
    model = golden_model("alternating_cross", mask_schedule="first_k:2")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "llava_qwen_with_alternating_cross_attn"
    assert config.special_layers() == (True, True, False, False, False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = {"inputs_embeds": golden_embeddings(), "modality_ids": IDS}
    assert torch.equal(logits_of(again, **inputs), logits_of(model, **inputs))


def test_an_attention_that_cannot_follow_masks_is_refused() -> None:
    with pytest.raises(UserError, match="flex_attention cannot follow"):
        golden_model("alternating", attention="flex_attention")


def test_a_decoder_of_another_family_follows_the_masks_through_the_attention_interface() -> None:
    """Witness: with Qwen2's weights in it, Mistral is the golden model without q, k, v biases."""
    sizes = {k: v for k, v in TINY["config"].items() if k not in ("use_sliding_window",)}
    theta = sizes.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    mistral = AutoModelForCausalLM.from_config(
        MistralConfig(**sizes, rope_parameters=rope, sliding_window=None)
    ).eval()
    qwen = golden_model("alternating_cross")
    state = qwen.state_dict()
    for name in [n for n in state if n.endswith("bias")]:
        state[name].zero_()
    weights = {name: tensor for name, tensor in state.items() if not name.endswith("bias")}
    mistral.load_state_dict(weights)
    enable_alternating(mistral, "alternating_cross")
    inputs = {"inputs_embeds": golden_embeddings()}
    expected = logits_of(qwen, **inputs, modality_ids=IDS)
    given = logits_of(mistral, **inputs, modality_ids=IDS)
    torch.testing.assert_close(given, expected, **EXACT)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    ids = torch.arange(12)[None]
    with modalities(mistral, IDS):
        assert torch.equal(
            mistral.generate(ids, **options),
            qwen.generate(ids, modality_ids=IDS, **options),
        )


def test_the_configuration_of_a_checkpoint_keeps_its_dimensions_and_changes_its_class() -> None:
    source = DECODER_CONFIGS["alternating"](**TINY["config"])
    source.mask_schedule = "alternate"
    config = decoder_config(source, "alternating_cross", text_only="causal")
    assert config.model_type == "llava_qwen_with_alternating_cross_attn"
    assert (config.hidden_size, config.mask_schedule) == (16, "alternate")
    assert config.text_only == "causal"
    assert not hasattr(decoder_config(source, "base"), "mask_schedule")
    with pytest.raises(UserError, match="schedule"):
        decoder_config(source, "alternating", mask_schedule="first_k:9")


def stock_inputs(model: Any) -> dict[str, Tensor]:
    """transformers' own inputs: a 56 x 28 picture on a 1 x 2 canvas: 4 + 2 * (4 + 1) tokens."""
    ids = torch.tensor([[1, 2, *[70] * 14, 3, 4, 5]])
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 3, 28, 28, generator=torch.Generator().manual_seed(1)),
        "image_sizes": torch.tensor([[28, 56]]),
        "attention_mask": torch.ones_like(ids),
    }


@pytest.mark.parametrize("variant", ["base", *ALTERNATING])
def test_llavas_inputs_give_the_logits_of_transformers_own(variant: Variant) -> None:
    model = composed_model(variant, image_aspect_ratio="anyres_max_9")
    stock = stock_inputs(model)
    expected = logits_of(model, **stock)
    llava = {
        "input_ids": torch.tensor([[1, 2, -200, 3, 4, 5]]),
        "images": [stock["pixel_values"][0]],
        "image_sizes": [(56, 28)],
    }
    torch.testing.assert_close(logits_of(model, **llava), expected, atol=1e-5, rtol=0.0)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    given = model.generate(**llava, **options)
    assert torch.equal(given, model.generate(**stock, **options)[:, stock["input_ids"].shape[1] :])
    assert torch.equal(given, model.generate(**llava, **options, use_cache=False))


def test_rows_with_padding_are_generated_as_by_transformers_own_class() -> None:
    model = composed_model("base")
    stock = LlavaOnevisionForConditionalGeneration(model.config).eval()
    stock.load_state_dict(model.state_dict())
    inputs = stock_inputs(model)
    row = torch.cat([inputs["input_ids"], torch.tensor([[6, 7, 8]])], 1)
    inputs["input_ids"] = row
    # on the right: positions are counted without the padding, which masks alone do not show
    inputs["attention_mask"] = torch.ones_like(row).index_fill(1, torch.tensor([17, 18, 19]), 0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(**inputs, **options)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**inputs, **options, use_cache=use_cache), expected)


def test_a_composed_model_differs_from_its_base_exactly_by_the_masks() -> None:
    base, alternating = composed_model("base"), composed_model("alternating")
    alternating.load_state_dict(base.state_dict())
    stock = stock_inputs(base)
    assert not torch.allclose(logits_of(base, **stock), logits_of(alternating, **stock), atol=1e-3)
    text = {"input_ids": torch.tensor([[1, 2, 3]])}
    torch.testing.assert_close(logits_of(base, **text), logits_of(alternating, **text))


def test_rows_of_several_images_no_image_and_a_video_are_spliced_in_order() -> None:
    model = composed_model("alternating", mm_newline_position="grid", tokenizer_model_max_length=20)
    images = [torch.randn(n, 3, 28, 28) for n in (1, 1, 1, 3)]
    sizes = [(28, 28)] * 4
    kinds = ["image", "image", "text", "video"]
    ids = torch.tensor([[-200, 5, -200, 6], [7, 8, 0, 0], [9, -200, 4, 0]])
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    labels = ids.masked_fill(ids < 0, -100)
    spliced = model.splice(ids, images, sizes, kinds, attention_mask=keep, labels=labels)
    # 4 patches and a newline for each image; 1 patch and its newline for each of three frames
    assert ["".join(map(str, row)) for row in spliced.modality_ids.tolist()] == [
        "111110111110", "000000000000", "011111100000",
    ]  # fmt: skip
    assert spliced.attention_mask.sum(1).tolist() == [12, 2, 8]
    assert spliced.labels[0].tolist() == [-100] * 5 + [5] + [-100] * 5 + [6]
    assert spliced.labels[2, 7] == 4
    embedded = model.get_input_embeddings()(torch.tensor(5))
    assert torch.equal(spliced.inputs_embeds[0, 5], embedded)
    with pytest.raises(ValueError, match="2 images for 4 placeholders"):
        model.splice(ids.masked_fill(ids == 9, -200), images[:2], sizes[:2])
    cut = model.splice(ids[:1].repeat(1, 3), images[:2] * 3, sizes[:2] * 3)
    assert cut.inputs_embeds.shape[1] == 20


def test_a_cached_step_without_modalities_is_refused() -> None:
    model = composed_model("alternating")
    with torch.no_grad():
        start = model(**stock_inputs(model), use_cache=True)
    with pytest.raises(ValueError, match="modality_ids of the whole prompt"):
        model(input_ids=torch.tensor([[3]]), cache=start.cache)
