"""What only x060 has: low-rank widths that differ between released models."""

from __future__ import annotations

import torch

from rwkvtune.models import RWKV6Config, build_model, config_from_state_dict
from tests.models.comparing import difference, noisy_model, random_ids
from tests.models.formulas import plain_logits


def test_low_rank_widths_are_read_from_the_tensors_and_work() -> None:
    """The released model of width 4096 has 64 and 128 where the others have 32 and 64."""
    config = RWKV6Config(31, 2, 64, head_size=32, dim_ffn=100, mix_rank=7, decay_rank=9)
    model = noisy_model(config)
    weights = model.state_dict()
    assert weights["blocks.0.att.time_maa_w1"].shape == (64, 35)
    assert config_from_state_dict(weights) == config
    ids = random_ids(1, 20)
    with torch.no_grad():
        plain, _ = plain_logits("x060", {n: w.double() for n, w in weights.items()}, ids)
        assert difference(model(ids)[0], plain) < 1e-5
    published = RWKV6Config(31, 2, 64)
    assert (published.mix_rank, published.decay_rank, published.dim_ffn) == (32, 64, 224)


def test_low_rank_matrices_start_as_published_whatever_their_widths() -> None:
    weights = build_model(RWKV6Config(31, 2, 64, mix_rank=64, decay_rank=128), seed=1).state_dict()
    for name in ("time_maa", "time_decay"):
        assert not weights[f"blocks.1.att.{name}_w1"].any()
        second = weights[f"blocks.1.att.{name}_w2"]
        assert 0.0099 < second.abs().max() <= 0.01
        assert abs(second.mean()) < 5e-4
