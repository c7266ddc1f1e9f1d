"""Presets by name and path, and what is said about files that are none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rwkvtune.cli.main import main as rwkvtune
from rwkvtune.configs import ModelConfig, list_available_models, load_model_config, print_model_info
from rwkvtune.errors import UserError
from rwkvtune.models import RWKV7Config
from rwkvtune.models.rwkv7.config import SimpleTrainConfig

MADE_UP: dict[str, Any] = {
    "model_name": "RWKV7-Mouse",
    "architecture": {"n_layer": 3, "n_embd": 128, "vocab_size": 300, "head_size_a": 32},
    "lora_dims": {"dim_att_lora": 16, "dim_gate_lora": 24, "dim_mv_lora": 8},
    "training": {"recommended_ctx_len": 96, "recommended_batch_size": 3, "recommended_lr": 0.002},
}


def changed(**values: Any) -> dict[str, Any]:
    """MADE_UP with other values, `section__key=None` taking one away."""
    content = copy.deepcopy(MADE_UP)
    for path, value in values.items():
        section, _, key = path.rpartition("__")
        place = content[section] if section else content
        if value is None:
            del place[key]
        else:
            place[key] = value
    return content


@pytest.mark.parametrize(
    "identifier",
    ["7.2b", "7.2B", "rwkv7-7.2b", "RWKV7-7.2B", "RWKV7-G0-7.2B", " 7.2b ", "rwkv7-7.2b.json"],
)
def test_a_released_preset_has_several_names_in_either_case(identifier: str) -> None:
    config = load_model_config(identifier)
    assert repr(config) == (
        "ModelConfig(name='RWKV7-G0-7.2B', arch='rwkv7', n_layer=32, n_embd=4096)"
    )
    assert config.config_source == "builtin:rwkv7-7.2b"


def test_a_path_object_is_a_path_and_a_number_no_name(tmp_path: Path) -> None:
    (tmp_path / "mouse.json").write_text(json.dumps(MADE_UP))
    assert load_model_config(tmp_path / "mouse.json").n_embd == MADE_UP["architecture"]["n_embd"]
    with pytest.raises(UserError, match="1.5 names no preset: give text"):
        load_model_config(1.5)  # type: ignore[arg-type]


def test_a_model_is_added_by_adding_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rwkv7-Mouse.json"
    path.write_text(json.dumps(MADE_UP))
    (tmp_path / "tokenizer.json").write_text("{}")  # of a folder of weights, and no preset
    (tmp_path / "rwkv8-mouse.json").write_text(json.dumps(MADE_UP))
    with pytest.raises(FileNotFoundError):
        load_model_config("mouse")
    for config in (load_model_config(str(path)), load_model_config("MOUSE", str(tmp_path))):
        assert config.config_source == f"file:{path}"
        assert config.dimensions == RWKV7Config(
            300, 3, 128, 32, dim_ffn=512, decay_rank=16, a_rank=16, v_rank=8, g_rank=24
        )
    # In a folder that the user names once, it has a name everywhere.
    monkeypatch.setenv("RWKVTUNE_MODELS", f"/no/such/folder:{tmp_path}")
    assert load_model_config("mouse").config_source == f"file:{path}"
    other = load_model_config("mouse", default_arch="rwkv8")
    assert other.config_source == f"file:{tmp_path / 'rwkv8-mouse.json'}"
    assert len(list_available_models()) == 12 + 3
    (tmp_path / "rwkv8-mouse.json").unlink()
    assert rwkvtune(["configs", "list"]) == 0
    assert f"RWKV7-Mouse      {path}" in capsys.readouterr().out
    assert rwkvtune(["configs", "check"]) == 0
    # 2VC + L (4C^2 + 8C^2 + 2C(16+16+24) + 18C) + (L-1)(2C*8 + C) + 4C
    count = 76800 + 3 * (196608 + 14336 + 2304) + 2 * 2176 + 512
    *_, mouse, last = capsys.readouterr().out.splitlines()
    assert mouse.split()[:4] == ["pass", "rwkv7-mouse", "RWKV7-Mouse", f"{count:,}"]
    assert last == "7/7 passed"


def test_a_preset_of_the_users_own_wins_over_one_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rwkv7-0.1b.json").write_text(json.dumps(MADE_UP))
    monkeypatch.setenv("RWKVTUNE_MODELS", str(tmp_path))
    assert load_model_config("0.1b").n_layer == load_model_config("RWKV7-0.1B").n_layer == 3


def test_attributes_and_dictionary_have_the_published_names() -> None:
    config = ModelConfig(changed(model_file="mouse.pth", architecture__ctx_len=512))
    shown = {name: getattr(config, name) for name in (
        "architecture_version", "model_name", "description", "model_file", "n_layer", "n_embd",
        "vocab_size", "head_size_a", "ctx_len", "dim_att_lora", "dim_gate_lora", "dim_mv_lora",
        "recommended_ctx_len", "recommended_batch_size", "recommended_lr", "config_source",
    )}  # fmt: skip
    assert shown == {
        "architecture_version": "rwkv7", "model_name": "RWKV7-Mouse", "description": "",
        "model_file": "mouse.pth", "n_layer": 3, "n_embd": 128, "vocab_size": 300,
        "head_size_a": 32, "ctx_len": 512, "dim_att_lora": 16, "dim_gate_lora": 24,
        "dim_mv_lora": 8, "recommended_ctx_len": 96, "recommended_batch_size": 3,
        "recommended_lr": 0.002, "config_source": "",
    }  # fmt: skip
    flat = config.to_train_config_dict()
    assert flat == {
        "n_layer": 3, "n_embd": 128, "vocab_size": 300, "head_size_a": 32, "dim_att_lora": 16,
        "dim_gate_lora": 24, "dim_mv_lora": 8,
    }  # fmt: skip
    assert SimpleTrainConfig(**flat).model_config() == config.dimensions


def test_what_a_preset_leaves_open_stays_open(capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(changed(training=None, model_name=None))
    assert (config.model_name, config.ctx_len, config.recommended_lr) == ("Unknown", None, None)
    assert config.recommended() == {} and config.model_path is None
    print_model_info(config)
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["architecture"] == "rwkv7, n_layer 3, n_embd 128, n_head 4 of 32, vocab_size 300"
    assert told["recommended"].startswith("nothing") and told["weights"] == "none named"


def test_ranks_and_width_that_the_published_keys_cannot_say() -> None:
    config = ModelConfig(changed(lora_dims__dim_a_lora=40, architecture__dim_ffn=448))
    assert (config.dimensions.a_rank, config.dimensions.decay_rank) == (40, 16)
    assert config.dimensions.dim_ffn == 448


@pytest.mark.parametrize(
    ("content", "complaints"),
    [
        (changed(architecture__n_embd=None), ["architecture.n_embd is missing"]),
        (
            {"architecture": {"n_layer": 2}},
            [
                "architecture.n_embd is missing",
                "architecture.vocab_size is missing",
                "architecture.head_size_a is missing",
                "lora_dims.dim_att_lora is missing",
                "lora_dims.dim_gate_lora is missing",
                "lora_dims.dim_mv_lora is missing",
            ],
        ),
        (
            changed(architecture__n_layers=4),
            ["unknown key architecture.n_layers (did you mean n_layer?)"],
        ),
        (changed(architecture__head_size=64), ["(did you mean head_size_a?)"]),
        (changed(n_layer=4), ["unknown key n_layer (it belongs in architecture)"]),
        (changed(trainings={}), ["unknown key trainings (did you mean training?)"]),
        (changed(zzz=1), ["unknown key zzz. The keys are model_name, model_file"]),
        (
            changed(architecture__n_layer="3"),
            ["architecture.n_layer must be a whole number, not text '3'"],
        ),
        (
            changed(architecture__n_layer=3.0),
            ["architecture.n_layer must be a whole number, not a number 3.0"],
        ),
        (changed(architecture__n_layer=True), ["not true or false True"]),
        (
            changed(lora_dims__dim_mv_lora=0),
            ["lora_dims.dim_mv_lora must be greater than 0, not 0"],
        ),
        (
            changed(training__recommended_lr="1e-5"),
            ["training.recommended_lr must be a number, not text '1e-5'"],
        ),
        (
            changed(training__recommended_lr=float("nan")),
            ["recommended_lr must be greater than 0, not nan"],
        ),
        (changed(training__recommended_lr=3), ["recommended_lr must be below 1, not 3"]),
        (
            changed(training__recommended_batch_size=-1),
            ["recommended_batch_size must be greater than 0, not -1"],
        ),
        (changed(lora_dims=[1]), ["lora_dims must be an object with keys of its own, not a list"]),
        (changed(model_file=3), ["model_file must be text, not a number 3"]),
        (changed(model_file=""), ["model_file must be a file name, or null for none"]),
        (changed(architecture__n_embd=100), ["n_embd=100 is not a multiple of head_size=32"]),
        (
            changed(architecture_version="rwkv6"),
            ["architecture_version is 'rwkv6', and presets are for rwkv7"],
        ),
        ([], ["expected an object with the key architecture, found a list"]),
    ],
)
def test_a_file_that_is_no_preset_is_refused_with_all_reasons(
    content: Any, complaints: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "rwkv7-mouse.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        load_model_config(str(path))
    message = str(raised.value)
    assert message.startswith(f"file:{path}") and "\n" not in message
    for complaint in complaints:
        assert complaint in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"{\n 'a': 1}", "line 2, column 2: this is no JSON"),
        (b"", "line 1, column 1: this is no JSON"),
        (b"\xff\xfe{}", "it is not UTF-8 text"),
        (b'{"architecture": {"n_layer": 2, "n_layer": 3}}', "has the key n_layer twice"),
    ],
)
def test_a_file_that_is_no_json_is_named_with_the_place(
    text: bytes, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "rwkv7-mouse.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as raised:
        load_model_config(str(path))
    assert str(path) in str(raised.value) and complaint in str(raised.value)


@pytest.mark.parametrize(
    ("identifier", "complaints"),
    [
        ("1.5", ["no preset '1.5' (did you mean 1.5b?)", "rwkv7-0.1b, rwkv7-0.4b", "JSON file"]),
        ("rwkv7-99b", ["rwkv7-13.3b"]),
        ("", ["no preset ''"]),
        ("rwkv8-1.5b", ["no preset 'rwkv8-1.5b'"]),
        ("no/such.json", ["no preset file no/such.json"]),
        ("mouse.json", ["no preset 'mouse.json'"]),
    ],
)
def test_a_name_that_does_not_exist_lists_what_does(identifier: str, complaints: list[str]) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        load_model_config(identifier)
    assert isinstance(raised.value, UserError)
    for complaint in complaints:
        assert complaint in str(raised.value)


def test_weights_and_folders_given_as_a_preset_are_recognised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="configs from-checkpoint w.pth"):
        load_model_config("w.pth")
    with pytest.raises(UserError, match="is a folder"):
        load_model_config(f"{tmp_path}/")
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_available_models(str(tmp_path / "none"))
