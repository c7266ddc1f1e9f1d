"""`--model_config` of `rwkvtune train`: weights, dimensions and recommended values of a preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.cli import published_flags
from rwkvtune.cli.main import main as rwkvtune
from rwkvtune.cli.train import make_parser, parse_settings
from rwkvtune.errors import UserError
from rwkvtune.models import ModelConfig, RWKV6Config, RWKV7Config, build_model
from rwkvtune.training.config import TrainConfig
from rwkvtune.training.starting_point import StartingPoint, find
from tests.configs.released import sparse_safetensors

TINY = RWKV7Config(97, 2, 64, decay_rank=16, a_rank=16, v_rank=8, g_rank=24)
PRESET: dict[str, Any] = {
    "model_name": "RWKV7-Tiny",
    "model_file": "tiny.pth",
    "architecture": {"n_layer": 2, "n_embd": 64, "vocab_size": 97, "head_size_a": 64},
    "lora_dims": {"dim_att_lora": 16, "dim_gate_lora": 24, "dim_mv_lora": 8},
    "training": {"recommended_ctx_len": 32, "recommended_batch_size": 2, "recommended_lr": 2e-4},
}


def write_model(path: Path, config: ModelConfig) -> Path:
    save_weights(path, build_model(config, seed=1).state_dict())
    return path


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A made-up preset with its weights beside it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write_model(folder / "tiny.pth", TINY)
    path = folder / "rwkv7-tiny.json"
    path.write_text(json.dumps(PRESET))
    return path


def find_start(folder: Path, **flags: Any) -> StartingPoint:
    return find(TrainConfig.from_flat({"proj_dir": str(folder), **flags}), None, [])


def settings_of(*argv: str) -> dict[str, Any]:
    return parse_settings(make_parser(), list(argv))


def test_recommended_values_hold_where_no_others_are_given(preset: Path, tmp_path: Path) -> None:
    names = ("ctx_len", "micro_bsz", "lr_init", "lr_final", "model_config")
    chosen = settings_of("--model_config", str(preset))
    assert [chosen[n] for n in names] == [32, 2, 2e-4, 2e-5, str(preset)]
    chosen = settings_of("--lr_init", "1e-5", "--model_config", str(preset), "--micro_bsz=8")
    assert [chosen[n] for n in names] == [32, 8, 1e-5, 1e-6, str(preset)]
    file = tmp_path / "run.yaml"
    file.write_text(f"ctx_len: 512\nmodel_config: {preset}\nlr_final: 0.5\n")
    chosen = settings_of("--config", str(file))
    assert [chosen[n] for n in names] == [512, 2, 2e-4, 0.5, str(preset)]
    assert settings_of("--model_config", "2.9B")["lr_init"] == 5e-6


def test_a_run_by_a_preset_alone_begins_with_its_weights_and_shows_its_values(
    preset: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run = ["train", "--model_config", str(preset), "--data_file", str(text), "--proj_dir"]
    run += [str(folder), "--micro_bsz", "1", "--threads", "1", "--exit_tokens"]
    assert rwkvtune([*run, "64"]) == 0
    told = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in told.splitlines() if "  " in line)
    assert rows["preset"] == f"RWKV7-Tiny (file:{preset})"
    assert rows["recommended"] == (
        "ctx_len 32, micro_bsz 2 (not followed: micro_bsz 1), lr_init 0.0002"
    )
    assert "0.0002 to 2e-05" in told and f"weights of {preset.parent / 'tiny.pth'}" in told
    start, given = load_weights(folder / "rwkv-init.pth"), load_weights(preset.parent / "tiny.pth")
    assert all((start[name] == given[name]).all() for name in given)
    # It goes on without the weights, and is refused when the preset has become another.
    (preset.parent / "tiny.pth").unlink()
    assert rwkvtune([*run, "96"]) == 0
    assert "steps             3, " in capsys.readouterr().out
    preset.write_text(json.dumps(PRESET | {"lora_dims": PRESET["lora_dims"] | {"dim_mv_lora": 9}}))
    assert rwkvtune([*run, "128"]) == 2
    assert "dim_mv_lora: preset 9, the run 8" in capsys.readouterr().err


def test_weights_given_by_a_flag_come_before_those_of_the_preset(
    preset: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other.pth", TINY)
    start = find_start(tmp_path / "run", model_config=str(preset), load_model=str(other))
    assert start.source == f"weights of {other}"
    start = find_start(tmp_path / "run", model_config=str(preset))
    assert start.source == f"weights of {preset.parent / 'tiny.pth'}"


def test_a_preset_without_a_file_makes_a_fresh_model_of_its_dimensions(
    preset: Path, tmp_path: Path
) -> None:
    preset.write_text(json.dumps(PRESET | {"model_file": None}))
    start = find_start(tmp_path / "run", model_config=str(preset))
    assert (start.source, start.model_config, start.weights) == ("initial values", TINY, None)


def test_weights_that_disagree_give_a_table_and_a_preset_that_fits_them(
    preset: Path, tmp_path: Path
) -> None:
    real = RWKV7Config(97, 3, 64, decay_rank=24, a_rank=32, v_rank=8, g_rank=24, dim_ffn=224)
    weights = write_model(tmp_path / "real-ctx512.pth", real)
    with pytest.raises(UserError) as raised:
        find_start(tmp_path / "run", model_config=str(preset), load_model=str(weights))
    head, table, block = (
        str(raised.value).partition("\n")[0],
        *str(raised.value).split(":\n", 2)[1:],
    )
    assert head == f"preset RWKV7-Tiny (file:{preset}) and {weights} disagree about 4 dimensions:"
    rows = {tuple(line.split()) for line in table.splitlines()[:5]}
    assert rows == {
        ("preset", "file"), ("n_layer", "2", "3"), ("dim_att_lora", "16", "24"),
        ("dim_a_lora", "16", "32"), ("dim_ffn", "256", "224"),
    }  # fmt: skip
    corrected = json.loads(block)
    assert corrected["training"] == PRESET["training"] and corrected["model_file"] == weights.name
    assert corrected["architecture"] == {
        "n_layer": 3, "n_embd": 64, "vocab_size": 97, "head_size_a": 64, "dim_ffn": 224,
        "ctx_len": 512,
    }  # fmt: skip
    (tmp_path / "rwkv7-real.json").write_text(block)
    start = find_start(tmp_path / "run", model_config=str(tmp_path / "rwkv7-real.json"))
    assert start.model_config == real
    assert not (tmp_path / "run").exists()


def test_the_published_size_mismatch_names_the_released_preset_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    path = sparse_safetensors(tmp_path / "w.safetensors", "rwkv7-1.5b")
    run = ["train", "--data_file", str(text), "--proj_dir", str(tmp_path / "run")]
    assert rwkvtune([*run, "--model_config", "2.9b", "--load_model", str(path)]) == 2
    message = capsys.readouterr().err
    assert "  n_layer             32       24\n" in message
    assert "  dim_gate_lora      320      256\n" in message
    assert "or --model_config rwkv7-1.5b, which fits these" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"n_layer": 3}, "n_layer: flag 3, preset 2"),
        ({"version": "x060"}, "version: flag x060, preset x070"),
        ({"interpolate": True}, "interpolate resizes weights"),
        ({"model_config": "0.1c"}, "no preset '0.1c' (did you mean"),
    ],
)
def test_what_contradicts_a_preset_is_refused(
    flags: dict[str, Any], complaint: str, preset: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        find_start(tmp_path / "run", **({"model_config": str(preset)} | flags))
    assert complaint in str(raised.value)


def test_weights_of_another_version_and_damaged_ones_are_one_line(
    preset: Path, tmp_path: Path
) -> None:
    finch = write_model(tmp_path / "finch.pth", RWKV6Config(97, 2, 64))
    with pytest.raises(UserError) as raised:
        find_start(tmp_path / "run", model_config=str(preset), load_model=str(finch))
    assert f"{finch} holds RWKV-6 x060" in str(raised.value) and "\n" not in str(raised.value)
    short = tmp_path / "short.pth"
    short.write_bytes((preset.parent / "tiny.pth").read_bytes()[:-3000])
    with pytest.raises(UserError) as raised:
        find_start(tmp_path / "run", model_config=str(preset), load_model=str(short))
    assert str(short) in str(raised.value) and "\n" not in str(raised.value)


def test_the_published_flags_take_a_preset_too(preset: Path) -> None:
    values = parse_settings(
        published_flags.make_parser(), ["--model_config", str(preset), "--my_testing", "x070"]
    )
    config, _, _ = published_flags.translate(values, {"model_config", "my_testing"}, "train_temp")
    assert (config.model.n_layer, config.model.n_embd) == (None, None)  # not RWKV-LM's defaults
    assert (config.data.ctx_len, config.schedule.lr_init) == (32, 2e-4)
