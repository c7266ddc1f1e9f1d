"""Sizes of adapters against published numbers, and forms read from tensors' names and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvtune.errors import UserError
from rwkvtune.models.vision.config import (
    AdapterConfig,
    adapter_config_from_shapes,
    adapter_names,
    split_names,
)
from rwkvtune.models.vision.model import Adapter


def test_sizes_for_the_2_9b_model_are_the_published_ones() -> None:
    base = AdapterConfig(768, 2560, 4 * 2560)
    large = AdapterConfig(1152, 2560, 4 * 2560)
    assert base.num_parameters == 34_096_640
    assert large.num_parameters == 38_028_800
    with torch.device("meta"):
        for config in (
            base,
            large,
            AdapterConfig(768, 2560, 2 * 2560, conv_kernel=3, conv_stride=2),
        ):
            assert sum(p.numel() for p in Adapter(config).parameters()) == config.num_parameters


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (577, {(3, 2): 288, (4, 3): 192, (5, 4): 144}),
        (576, {(3, 2): 287, (4, 3): 191, (5, 4): 143, (6, 5): 115}),
        (729, {(3, 2): 364, (4, 3): 242, (5, 4): 182, (6, 5): 145}),
    ],
)
def test_token_counts_after_the_convolution_are_the_published_ones(
    tokens: int, expected: dict[tuple[int, int], int]
) -> None:
    for (kernel, stride), count in expected.items():
        config = AdapterConfig(8, 16, 32, kernel, stride)
        assert config.num_tokens(tokens) == count
        assert Adapter(config)(torch.zeros(1, tokens, 8)).shape == (1, count, 16)
    assert AdapterConfig(8, 16, 32).num_tokens(tokens) == tokens


def test_a_pixel_shuffle_takes_a_sixteenth_and_only_of_a_fitting_square() -> None:
    config = AdapterConfig(8, 16, 0, shuffle=4, norm=False)
    assert config.num_tokens(576) == 36 and config.input_width == 128
    for tokens in (729, 577, 575):
        with pytest.raises(UserError, match="pixel shuffle"):
            config.num_tokens(tokens)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="not both"):
        AdapterConfig(8, 16, 32, 3, 2, shuffle=4)
    with pytest.raises(UserError, match="kernel and stride"):
        AdapterConfig(8, 16, 32, 3)
    with pytest.raises(UserError, match="positive"):
        AdapterConfig(0, 16, 32)
    with pytest.raises(UserError, match="needs at least 6 tokens"):
        AdapterConfig(8, 16, 32, 6, 5).num_tokens(5)


MLP = {"0.weight": (32, 8), "0.bias": (32,), "2.weight": (16, 32), "2.bias": (16,)}
NORM = {"pre_norm.weight": (16,), "pre_norm.bias": (16,)}


@pytest.mark.parametrize(
    ("prefix", "inner"),
    [("modality.world_encoder.adapter.", "proj."), ("proj.", "mlp."), ("", "proj."), ("", "mlp.")],
)
@pytest.mark.parametrize("conv", [False, True])
def test_an_adapter_is_found_in_files_of_every_published_style(
    prefix: str, inner: str, conv: bool
) -> None:
    tensors = {f"{inner}{name}": shape for name, shape in MLP.items()} | NORM
    if conv:
        tensors["conv.weight"] = (8, 8, 4)
    file = {prefix + name: shape for name, shape in tensors.items()}
    if prefix:
        file |= {"llm.emb.weight" if prefix == "proj." else "emb.weight": (99, 16)}
        file |= {"encoder.x.weight": (3, 3)} if prefix == "proj." else {
            "modality.world_encoder.model.x.weight": (3, 3)
        }  # fmt: skip
    names = adapter_names(file)
    config = adapter_config_from_shapes({n: file[old] for n, old in names.items()})
    assert config == AdapterConfig(8, 16, 32, *((4, 3) if conv else (0, 0)))
    assert set(names) == set(Adapter(config).state_dict())
    if prefix:
        llm, _, encoder = split_names(file)
        assert list(llm) == ["emb.weight"] and len(encoder) == 1


def test_the_forms_without_a_norm_are_told_by_their_shapes() -> None:
    gelu = {"proj.conv.weight": (8, 8, 6), **{f"proj.mlp.{n}": s for n, s in MLP.items()}}
    names = adapter_names(gelu)
    assert adapter_config_from_shapes({n: gelu[o] for n, o in names.items()}) == AdapterConfig(
        8, 16, 32, 6, 5, norm=False, activation="gelu"
    )
    shuffled = {"proj.proj.weight": (16, 128)}
    names = adapter_names(shuffled)
    config = adapter_config_from_shapes({n: shuffled[o] for n, o in names.items()}, encoder_width=8)
    assert config == AdapterConfig(8, 16, 0, shuffle=4, norm=False)
    assert set(names) == set(Adapter(config).state_dict())


def test_what_is_no_adapter_is_refused(golden: Path) -> None:
    with pytest.raises(UserError, match="no adapter"):
        adapter_config_from_shapes({})
    assert adapter_names({"emb.weight": (9, 9), "blocks.0.ln0.weight": (9,)}) == {}
