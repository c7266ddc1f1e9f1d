"""Witness: the product of the adapter's two matrices, added by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvtune.adapters.alternating import add_lora, merge_adapter, merged, save_lora
from rwkvtune.errors import UserError
from rwkvtune.training.alternating import choose_trainable
from rwkvtune.training.alternating_config import TuneOptions
from tests.models.alternating.tiny import composed_model


def test_adapters_learn_on_the_decoder_alone_and_merge_into_its_matrices(tmp_path: Path) -> None:
    model = composed_model("alternating")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose_trainable(model, TuneOptions())
    wrapped = add_lora(model, r=2, alpha=6, dropout=0.0, bias="none")
    learning = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "projector" in n or "image_newline" in n for n in learning)
    # 7 matrices in each of 4 layers, two factors each; projector; newline
    assert len(learning) == 7 * 4 * 2 + 4 + 1
    factors = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    save_lora(wrapped, tmp_path / "lora", "base")
    projector = "model.multi_modal_projector.linear_1.weight"
    trained = wrapped.get_base_model().get_parameter(projector).detach().clone()
    name = "model.language_model.layers.2.mlp.up_proj"
    a = factors[f"base_model.model.{name}.lora_A.default.weight"].detach().clone()
    b = factors[f"base_model.model.{name}.lora_B.default.weight"].detach().clone()
    after = merged(wrapped).state_dict()
    expected = before[f"{name}.weight"] + 6 / 2 * b @ a
    torch.testing.assert_close(after[f"{name}.weight"], expected)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])

    again = merge_adapter(composed_model("alternating"), tmp_path / "lora", "base").state_dict()
    for key, tensor in after.items():
        torch.testing.assert_close(again[key], tensor)
    assert torch.equal(again[projector], trained) and not torch.equal(trained, before[projector])
    with pytest.raises(UserError, match="other values than the base"):
        merge_adapter(composed_model("alternating", seed=1), tmp_path / "lora", "another")


def test_an_adapter_of_another_program_is_merged_as_peft_does(tmp_path: Path) -> None:
    model = composed_model("base")
    wrapped = add_lora(model, r=2, alpha=6, dropout=0.0, bias="none")
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path)
    after = merged(wrapped).state_dict()
    for key, tensor in merge_adapter(composed_model("base"), tmp_path, "base").state_dict().items():
        torch.testing.assert_close(tensor, after[key])


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter_config.json"):
        merge_adapter(composed_model("base"), tmp_path, "base")
