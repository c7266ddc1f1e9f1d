"""Witnesses: the product of the adapter's two matrices, added by hand; bitsandbytes' rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional

from rwkvtune.adapters.alternating import Adapted, adapt, merge_adapter
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.errors import UserError
from rwkvtune.training.alternating import choose_trainable
from rwkvtune.training.alternating_config import TuneOptions
from tests.models.alternating.tiny import composed_model, golden_model

LORA = AdapterSettings("lora", r=2, alpha=6)
IDS = torch.arange(1, 20)[None]


def with_noise(adapted: Adapted) -> Adapted:
    """All that learns gets values that matter."""
    torch.manual_seed(1)
    for parameter in adapted.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def test_adapters_learn_on_the_decoder_alone_and_merge_into_its_matrices(tmp_path: Path) -> None:
    model = composed_model("alternating")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose_trainable(model, TuneOptions())
    adapted = with_noise(adapt(model, LORA, "base", dropout=0.0, bias="none"))
    learning = {n: p for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "projector" in n or "image_newline" in n for n in learning)
    # 7 matrices in each of 4 layers, two factors each; projector; newline
    assert len(learning) == 7 * 4 * 2 + 4 + 1
    adapted.save(tmp_path / "lora")
    projector = "model.multi_modal_projector.linear_1.weight"
    trained = adapted.model.get_base_model().get_parameter(projector).detach().clone()
    name = "model.language_model.layers.2.mlp.up_proj"
    a = learning[f"base_model.model.{name}.lora_A.default.weight"].detach().clone()
    b = learning[f"base_model.model.{name}.lora_B.default.weight"].detach().clone()
    after = adapted.merged().state_dict()
    expected = before[f"{name}.weight"] + 6 / 2 * b @ a
    torch.testing.assert_close(after[f"{name}.weight"], expected)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])

    again = merge_adapter(composed_model("alternating"), tmp_path / "lora", "base").state_dict()
    for key, tensor in after.items():
        torch.testing.assert_close(again[key], tensor)
    assert torch.equal(again[projector], trained) and not torch.equal(trained, before[projector])
    with pytest.raises(UserError, match="other values than the base"):
        merge_adapter(composed_model("alternating", seed=1), tmp_path / "lora", "another")


def test_in_a_language_model_alone_only_the_adapters_learn() -> None:
    model = golden_model("alternating")
    choose_trainable(model, TuneOptions())
    adapted = adapt(model, LORA, "base", dropout=0.0, bias="none")
    learning = [n for n, p in adapted.model.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name for name in learning)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "miss"])
@pytest.mark.parametrize("quant", ["none", "nf4", "fp4", "int8"])
def test_every_kind_on_every_base_answers_the_same_when_it_is_merged(
    kind: str, quant: str, tmp_path: Path
) -> None:
    settings = AdapterSettings(kind, r=2, alpha=None if kind == "miss" else 4, quant=quant)
    model = composed_model("alternating")
    before = model(input_ids=IDS).logits
    choose_trainable(model, TuneOptions())
    adapted = with_noise(adapt(model, settings, "base", dropout=0.0, bias="lora_only"))
    unmerged = adapted.model.eval()(input_ids=IDS).logits.detach()
    assert not torch.allclose(before, unmerged, atol=0.01)
    adapted.save(tmp_path / "adapter")
    merged = adapted.merged()(input_ids=IDS).logits
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5)
    again = merge_adapter(composed_model("alternating"), tmp_path / "adapter", "base")
    torch.testing.assert_close(again.eval()(input_ids=IDS).logits, unmerged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_packed_decoder_computes_with_what_bitsandbytes_makes_of_its_matrices(kind: str) -> None:
    rounded = composed_model("alternating")
    for name, weight in rounded.named_parameters():
        if "language_model.layers" in name and weight.dim() == 2:
            packed, state = functional.quantize_4bit(
                weight.data.flatten(), blocksize=64, quant_type=kind
            )
            weight.data = functional.dequantize_4bit(packed, state).view_as(weight)
    adapted = adapt(
        composed_model("alternating"),
        AdapterSettings("lora", quant=kind),
        "base",
        dropout=0.0,
        bias="none",
    )
    assert adapted.quantized is not None and len(adapted.quantized.quantized) == 7 * 4
    torch.testing.assert_close(
        adapted.model.eval()(input_ids=IDS).logits, rounded(input_ids=IDS).logits, rtol=0, atol=1e-5
    )


def test_an_adapter_of_another_program_is_merged_as_peft_does(tmp_path: Path) -> None:
    model = composed_model("base").requires_grad_(False)
    adapted = with_noise(adapt(model, LORA, "base", dropout=0.0, bias="none"))
    adapted.model.save_pretrained(tmp_path)
    after = adapted.merged().state_dict()
    for key, tensor in merge_adapter(composed_model("base"), tmp_path, "base").state_dict().items():
        torch.testing.assert_close(tensor, after[key])


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter_config.json"):
        merge_adapter(composed_model("base"), tmp_path, "base")
