"""Witness: an explicit table of published key names, and transformers' own classes as readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from rwkvtune.errors import UserError
from rwkvtune.inference.alternating import (
    Checkpoint,
    export,
    from_backbone,
    load,
    load_adapter,
    save_adapter,
)
from rwkvtune.models.alternating.variants import Variant
from tests.models.alternating.tiny import composed_model, golden_model

PUBLISHED_NAMES = {
    "llava": {
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
        "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias": (
            "model.vision_tower.post_layernorm.bias"
        ),
        "model.image_newline": "model.image_newline",
    },
    "hf": {
        "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "multi_modal_projector.linear_2.bias": "model.multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight": (
            "model.vision_tower.encoder.layers.1.mlp.fc1.weight"
        ),
        "image_newline": "model.image_newline",
    },
    "qwen2": {
        "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight"
    },
}


@pytest.mark.parametrize("naming", ["llava", "hf", "qwen2"])
@pytest.mark.parametrize("variant", ["base", "alternating_cross"])
def test_every_naming_holds_the_published_names_and_comes_back_bit_equal(
    tmp_path: Path, variant: Variant, naming: Any
) -> None:
    model = composed_model(variant, mm_newline_position="grid", image_aspect_ratio="pad")
    export(model, tmp_path / "out", naming)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    state = model.state_dict()
    for name, in_memory in PUBLISHED_NAMES[naming].items():
        assert torch.equal(stored[name], state[in_memory])
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert (checkpoint.naming, checkpoint.variant) == (naming, variant)
    again, report = load(checkpoint)
    assert not (report.unexpected or report.skipped)
    if naming == "qwen2":
        assert torch.equal(again.model.norm.weight, state["model.language_model.norm.weight"])
        return
    assert type(again) is type(model)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert again.packing_rule() == model.packing_rule()
    assert again.config.image_grid_pinpoints == model.config.image_grid_pinpoints


def test_transformers_own_classes_read_what_is_exported(tmp_path: Path) -> None:
    model = composed_model("base")
    export(model, tmp_path / "hf", "hf")
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "hf")
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    export(model, tmp_path / "lm", "qwen2")
    language = Qwen2ForCausalLM.from_pretrained(tmp_path / "lm")
    assert torch.equal(language.lm_head.weight, model.lm_head.weight)


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    model = composed_model("alternating")
    model.save_pretrained(tmp_path, max_shard_size="30kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, _ = load(Checkpoint.open(tmp_path))
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())


def test_another_class_takes_the_same_weights(tmp_path: Path) -> None:
    export(composed_model("base"), tmp_path / "base", "llava")
    model, _ = load(Checkpoint.open(tmp_path / "base"), variant="alternating", mask_schedule="0,1")
    assert model.config.model_type == "llava_onevision_with_alternating_attn"
    assert [layer.is_special for layer in model.model.language_model.layers] == [True] * 2 + [
        False
    ] * 2


def make_backbone(folder: Path) -> Qwen2ForCausalLM:
    model: Qwen2ForCausalLM = golden_model("base")
    model.save_pretrained(folder)
    return model


def test_a_backbone_fills_the_language_model_and_a_tower_the_vision_part(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "qwen")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    tower = SiglipVisionModel(
        SiglipVisionConfig(**sizes, num_hidden_layers=3, image_size=28, patch_size=14)
    )
    tower.save_pretrained(tmp_path / "google" / "siglip-so400m-patch14-384")
    model, report, _ = from_backbone(Checkpoint.open(tmp_path / "qwen"), "alternating")
    counts = report.counts()
    # 1 embedding, 12 tensors in each of 5 layers, the last norm, the head
    assert counts["lm"]["matched"] == 63 and not counts["lm"]["missing"]
    assert counts["projector"]["missing"] == 4 and counts["newline"]["missing"] == 1
    assert (
        counts["vision"]["matched"]
        == sum("layers" in n for n in model.state_dict() if "vision" in n) + 5
    )
    assert not counts["vision"]["missing"] and counts["vision"]["skipped"] > 0
    state = model.state_dict()
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(state[f"model.language_model.{name}"], tensor)
    theirs = {n.removeprefix("vision_model."): t for n, t in tower.state_dict().items()}
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, theirs[name])


def test_a_backbone_alone_becomes_a_language_model(tmp_path: Path) -> None:
    make_backbone(tmp_path / "qwen")
    model, report, notes = from_backbone(Checkpoint.open(tmp_path / "qwen"), "alternating_cross")
    assert report.total == len(report.matched) == 63
    assert model.config.model_type == "llava_qwen_with_alternating_cross_attn"
    assert "language model alone" in notes[0]
    with pytest.raises(UserError, match="no folder nowhere"):
        from_backbone(Checkpoint.open(tmp_path / "qwen"), "alternating", vision_tower="nowhere")


def test_mistral_becomes_a_qwen2_without_biases(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "head_dim": 4,
    }
    layers: dict[str, Any] = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    mistral = MistralForCausalLM(MistralConfig(**sizes, **layers, sliding_window=None)).eval()
    mistral.save_pretrained(tmp_path)
    model, _ = load(Checkpoint.open(tmp_path), variant="alternating")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, mistral(ids).logits)


def test_a_checkpoint_that_does_not_fit_is_refused_with_what_differs(tmp_path: Path) -> None:
    make_backbone(tmp_path / "qwen")
    path = tmp_path / "qwen" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"intermediate_size": 40}))
    wanted = r"mlp.*_proj.weight is \[.*24.*\] in the file and \[.*40.*\] in the model"
    with pytest.raises(UserError, match=wanted):
        load(Checkpoint.open(tmp_path / "qwen"))
    path.write_text(json.dumps(values | {"model_type": "gpt2", "n_embd": 8}))
    with pytest.raises(UserError, match="is a gpt2 model"):
        load(Checkpoint.open(tmp_path / "qwen"))
    (tmp_path / "qwen" / "model.safetensors").unlink()
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="has no weights"):
        load(Checkpoint.open(tmp_path / "qwen"))
    with pytest.raises(UserError, match="no folder .*gone"):
        Checkpoint.open(tmp_path / "gone")


def test_the_projector_goes_to_mm_projector_bin_and_back(tmp_path: Path) -> None:
    model, other = composed_model("alternating"), composed_model("alternating", seed=5)
    save_adapter(model, tmp_path / "mm_projector.bin")
    stored = torch.load(tmp_path / "mm_projector.bin")
    assert sorted(stored) == [
        f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")
    ]
    assert load_adapter(other, tmp_path / "mm_projector.bin") == 4
    assert torch.equal(
        other.model.multi_modal_projector.linear_2.weight, stored["model.mm_projector.2.weight"]
    )
    del stored["model.mm_projector.2.bias"]
    torch.save(stored, tmp_path / "part.pth")
    with pytest.raises(UserError, match="lacks model.multi_modal_projector.linear_2.bias"):
        load_adapter(other, tmp_path / "part.pth")
