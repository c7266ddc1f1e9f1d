"""Where a run starts from, and what is refused before anything is written."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkvtune.checkpoint import resume_folder, save_resume_state, save_weights
from rwkvtune.data.tokenizers import load_tokenizer
from rwkvtune.errors import UserError
from rwkvtune.models import (
    ModelConfig,
    RWKV5Config,
    RWKV6Config,
    RWKV7Config,
    build_model,
    fill_model,
)
from rwkvtune.training.config import TrainConfig
from rwkvtune.training.starting_point import StartingPoint, find

CONFIG = RWKV7Config(vocab_size=31, n_layer=2, n_embd=64, head_size=32)


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    return build_model(config, seed=seed).state_dict()


def find_start(folder: Path, **flags: Any) -> tuple[StartingPoint, list[str]]:
    notes: list[str] = []
    config = TrainConfig.from_flat({"proj_dir": str(folder), **flags})
    return find(config, None, notes), notes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "given.pth"
    save_weights(path, weights_of(CONFIG))
    return path


def test_dimensions_come_from_the_file_and_flags_may_repeat_them(
    tmp_path: Path, file: Path
) -> None:
    for flags in ({}, {"n_layer": 2, "n_embd": 64, "vocab_size": 31, "head_size": 32}):
        start, notes = find_start(tmp_path / "run", load_model=str(file), **flags)
        assert start.model_config == CONFIG and start.weights is not None
        assert str(file) in start.source and not notes
    assert not (tmp_path / "run").exists(), "looking for a start wrote something"


def test_flags_that_disagree_with_the_file_are_all_named_with_both_values(
    tmp_path: Path, file: Path
) -> None:
    with pytest.raises(UserError) as caught:
        find_start(tmp_path, load_model=str(file), n_layer=3, vocab_size=50, n_embd=64, g_rank=96)
    message = str(caught.value)
    assert str(file) in message and "--interpolate" in message
    assert "n_layer: flag 3, file 2" in message
    assert "vocab_size: flag 50, file 31" in message
    assert "g_rank: flag 96, file 32" in message
    assert "n_embd" not in message


def along_the_first_axis(source: Tensor, rows: int) -> Tensor:
    """Upstream's stage 1, row by row: row i is the source at i / rows of its length."""
    result = []
    for i in range(rows):
        position = i / rows * len(source)
        low = math.floor(position)
        share = position - low
        if position >= len(source) - 1:
            result.append(source[-1])
        else:
            result.append(source[low] * (1 - share) + source[low + 1] * share)
    return torch.stack(result)


@pytest.mark.parametrize("vocab_size", [40, 62, 20])
def test_interpolation_resizes_along_the_first_axis_and_says_so_once_per_tensor(
    tmp_path: Path, file: Path, vocab_size: int
) -> None:
    start, notes = find_start(
        tmp_path, load_model=str(file), vocab_size=vocab_size, interpolate=True
    )
    assert start.model_config.vocab_size == vocab_size and start.weights is not None
    original = weights_of(CONFIG)
    assert start.weights.keys() == original.keys()
    for name, weight in original.items():
        resized = name in ("emb.weight", "head.weight")
        wanted = along_the_first_axis(weight, vocab_size) if resized else weight
        assert (start.weights[name] - wanted).abs().max() < 1e-6, name
    assert notes == [
        f"interpolated emb.weight: [31, 64] -> [{vocab_size}, 64]",
        f"interpolated head.weight: [31, 64] -> [{vocab_size}, 64]",
    ]
    model = build_model(start.model_config)
    fill_model(model, start.weights, start.source)


def test_interpolation_refuses_what_has_no_place_in_the_wanted_model(
    tmp_path: Path, file: Path
) -> None:
    with pytest.raises(UserError, match=r"hold blocks\.1\.\S+, which the wanted model \(n_layer 1"):
        find_start(tmp_path, load_model=str(file), n_layer=1, interpolate=True)
    with pytest.raises(UserError, match=r"cannot resize emb.weight from \[31, 64\] to \[31, 96\]"):
        find_start(tmp_path, load_model=str(file), n_embd=96, interpolate=True)


def test_without_weights_the_flags_and_the_tokenizer_make_the_model(tmp_path: Path) -> None:
    config = TrainConfig.from_flat({"proj_dir": str(tmp_path / "run"), "n_layer": 3, "n_embd": 128})
    start = find(config, load_tokenizer("bytes"), [])
    assert start.model_config == RWKV7Config(vocab_size=257, n_layer=3, n_embd=128)
    assert start.weights is None and start.resume_state is None
    assert find_start(tmp_path / "run")[0].model_config == RWKV7Config(65536, 12, 768)


@pytest.mark.parametrize("config", [RWKV5Config(31, 2, 64), RWKV6Config(31, 2, 64, mix_rank=8)])
def test_the_file_tells_the_version_and_flags_may_only_confirm_it(
    tmp_path: Path, config: ModelConfig
) -> None:
    path = tmp_path / "weights.pth"
    save_weights(path, weights_of(config))
    for version in (None, config.version):
        start, _ = find_start(tmp_path / "run", load_model=str(path), version=version)
        assert start.model_config == config
    with pytest.raises(UserError, match=f"version: flag x070, file {config.version}"):
        find_start(tmp_path / "run", load_model=str(path), version="x070")
    with pytest.raises(UserError, match=f"g_rank: flag 8, file is {config.version} and has none"):
        find_start(tmp_path / "run", load_model=str(path), g_rank=8)
    start, notes = find_start(
        tmp_path / "run", load_model=str(path), vocab_size=40, n_layer=3, interpolate=True
    )
    assert start.model_config == replace(config, vocab_size=40, n_layer=3)
    assert any("emb.weight: [31, 64] -> [40, 64]" in note for note in notes)


def test_a_dimension_that_a_version_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an x052 model has no mix_rank and no decay_rank: leave"):
        find_start(tmp_path / "run", version="x052", mix_rank=32, decay_rank=64)
    with pytest.raises(UserError, match="an x070 model has no mix_rank: .* v_rank, g_rank$"):
        find_start(tmp_path / "run", mix_rank=32)
    start, _ = find_start(tmp_path / "run", version="x060", mix_rank=16)
    assert start.model_config == RWKV6Config(65536, 12, 768, mix_rank=16, decay_rank=64)


def test_the_highest_numbered_weights_of_the_folder_go_before_those_given(
    tmp_path: Path, file: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_weights(run / "rwkv-init.pth", weights_of(CONFIG, seed=1))
    start, _ = find_start(run)
    assert start.source.endswith("rwkv-init.pth") and start.epochs_behind == 0
    for number in (2, 10, 9):
        save_weights(run / f"rwkv-{number}.pth", weights_of(CONFIG, seed=number))
    start, notes = find_start(run, load_model=str(file))
    assert start.epochs_behind == 11 and start.weights is not None
    assert torch.equal(start.weights["emb.weight"], weights_of(CONFIG, seed=10)["emb.weight"])
    assert len(notes) == 1 and "rwkv-10.pth" in notes[0] and "new optimizer" in notes[0]
    with pytest.raises(UserError, match="already holds a run and resume=never"):
        find_start(run, resume="never")


def test_a_resume_state_goes_before_all_weights_and_its_dimensions_are_confirmed(
    tmp_path: Path, file: Path
) -> None:
    save_weights(tmp_path / "rwkv-3.pth", weights_of(CONFIG))
    settings = {"version": "x070", "model": asdict(CONFIG)}
    meta = {"settings": settings, "progress": {"step": 7, "tokens": 700}}
    state = resume_folder(tmp_path, 7)
    save_resume_state(state, {"x": torch.zeros(1)}, meta)
    start, _ = find_start(tmp_path, load_model=str(file))
    assert start.resume_state == state and start.weights is None
    assert (start.progress.step, start.progress.tokens, start.model_config) == (7, 700, CONFIG)
    assert find_start(tmp_path, n_embd=64)[0].problems == []
    assert find_start(tmp_path, n_embd=128)[0].problems == ["n_embd: flag 128, the run 64"]
    assert find_start(tmp_path, version="x060", mix_rank=32)[0].problems == [
        "version: flag x060, the run x070", "mix_rank: flag 32, the run is x070 and has none",
    ]  # fmt: skip


def test_final_weights_without_a_resume_state_are_not_trained_over(tmp_path: Path) -> None:
    for name in ("rwkv-init.pth", "rwkv-final.pth"):
        save_weights(tmp_path / name, weights_of(CONFIG))
    with pytest.raises(UserError, match=r"finished run .*--load_model .*rwkv-final\.pth"):
        find_start(tmp_path)


def test_a_file_in_the_place_of_the_run_folder_is_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UserError, match="is a file; give a folder"):
        find_start(file)


def test_a_missing_or_foreign_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        find_start(tmp_path, load_model=str(tmp_path / "nowhere.pth"))
    save_weights(tmp_path / "other.pth", {"layer.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="no RWKV that rwkvtune knows"):
        find_start(tmp_path, load_model=str(tmp_path / "other.pth"))


def test_a_folder_without_a_run_is_refused_when_one_is_required(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UserError, match="holds no run to go on with"):
        find_start(tmp_path / "run", load_model=str(file), resume="required")
    (tmp_path / "run").mkdir()
    save_weights(tmp_path / "run" / "rwkv-init.pth", weights_of(CONFIG))
    assert find_start(tmp_path / "run", resume="required")[0].model_config == CONFIG
