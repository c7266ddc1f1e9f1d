"""Gradient norms and decays per block, against plain autograd and the formulas in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.training.layer_stats import layer_statistics

CONFIG = RWKV7Config(vocab_size=31, n_layer=3, n_embd=64)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def test_gradient_norms_are_those_of_all_gradients_of_a_part_as_one_vector(fabric: Fabric) -> None:
    model = build_model(CONFIG, seed=1)
    ids = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(2))
    logits, _ = model(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    rows = layer_statistics(fabric, fabric.setup_module(model))
    assert len(rows) == 3
    for i, row in enumerate(rows):
        for part in ("att", "ffn"):
            gradients = [
                p.grad.double().flatten()
                for name, p in model.named_parameters()
                if name.startswith(f"blocks.{i}.{part}.") and p.grad is not None
            ]
            expected = float(torch.linalg.norm(torch.cat(gradients)))
            assert expected > 0
            assert row[f"{part}_grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_decays_are_those_of_the_bias_alone(fabric: Fabric) -> None:
    model = build_model(CONFIG, seed=1)
    biases = torch.linspace(-8, 4, 64)[torch.randperm(64)]
    with torch.no_grad():
        model.get_parameter("blocks.1.att.w0").copy_(biases.view(1, 1, 64))
    row = layer_statistics(fabric, model)[1]
    # exp(-exp(-0.5) sigmoid(w)), in the standard library's fp64
    decays = [math.exp(-math.exp(-0.5) / (1 + math.exp(-w))) for w in biases.tolist()]
    expected = {"decay_min": min(decays), "decay_mean": sum(decays) / 64, "decay_max": max(decays)}
    assert row == pytest.approx(expected, rel=1e-6)  # and no norms, as nothing has a gradient


def test_frozen_parts_and_models_of_other_kinds_have_no_numbers(fabric: Fabric) -> None:
    assert layer_statistics(fabric, nn.Linear(2, 2)) == []

    class Older(nn.Module):
        """Blocks as elsewhere, without a decay."""

        def __init__(self) -> None:
            super().__init__()
            parts = nn.ModuleDict({"att": nn.Linear(2, 2), "ffn": nn.Linear(2, 2)})
            self.blocks = nn.ModuleList([parts])

    model = Older()
    model.get_parameter("blocks.0.att.weight").grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert layer_statistics(fabric, model) == [{"att_grad_norm": pytest.approx(5.0)}]
