"""What only x070 has: low-rank widths of two trees, gains of wide ranks, and the first block's
parameters that nothing reads."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rwkvtune.models import RWKV7Config, build_model, config_from_state_dict
from tests.models.comparing import difference


def test_the_older_trees_low_rank_widths_are_read_from_the_tensors(golden: Path) -> None:
    file = load_file(golden / "x070-v5tree-block0.safetensors")
    weights = {name[2:]: w.float() for name, w in file.items() if name.startswith("w.")}
    # The file holds the first of three blocks; these three make it a model.
    weights |= {"ln_out.weight": torch.ones(128), "ln_out.bias": torch.zeros(128)}
    weights["head.weight"] = torch.zeros(97, 128)
    config = config_from_state_dict(weights)
    assert isinstance(config, RWKV7Config)
    assert (config.decay_rank, config.a_rank, config.v_rank, config.g_rank) == (32, 32, 32, 32)
    assert RWKV7Config(vocab_size=97, n_layer=3, n_embd=128).g_rank == 64
    model = build_model(config)
    model.load_state_dict(weights)
    hidden, state = model(file["idx"], head=lambda hidden, weight: hidden)
    wanted = F.layer_norm(file["act.block.0"], (128,))
    assert difference(hidden, wanted) < 2e-5
    assert difference(state[0].wkv, file["state.0"]) < 1e-5


def test_a_large_vocabulary_and_wide_ranks_raise_the_gain() -> None:
    config = RWKV7Config(vocab_size=256, n_layer=2, n_embd=64, head_size=32, g_rank=256)
    weights = build_model(config, seed=1).state_dict()
    head, g2 = weights["head.weight"], weights["blocks.1.att.g2"]
    assert difference(head.T @ head, torch.eye(64) * (0.5 * 2) ** 2) < 1e-5  # sqrt(256 / 64) = 2
    assert difference(g2.T @ g2, torch.eye(64) * (0.1 * 2) ** 2) < 1e-6
