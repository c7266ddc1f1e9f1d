"""The six presets against the published table, the published tensors and counts in closed form."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch

from rwkvtune.cli import check_configs
from rwkvtune.cli.main import main as rwkvtune
from rwkvtune.configs import list_available_models, load_model_config
from rwkvtune.configs.preset import BUILTIN_FOLDER
from rwkvtune.models import build_model
from tests.configs.released import COLUMNS, SIZES, published_tensors


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_says_what_was_published(name: str) -> None:
    size = SIZES[name]
    content = json.loads((BUILTIN_FOLDER / f"{name}.json").read_text())
    keys = [k for k in COLUMNS if k not in ("billions", "parameters")]
    flat = content | content["architecture"] | content["lora_dims"] | content["training"]
    assert {key: flat[key] for key in keys} == {key: size[key] for key in keys}
    config = load_model_config(name)
    assert {key: getattr(config, key) for key in keys} == {key: size[key] for key in keys}
    assert (config.vocab_size, config.head_size_a, config.architecture_version) == (
        65536, 64, "rwkv7",
    )  # fmt: skip
    assert set(content) == {
        "model_name", "model_file", "description", "architecture", "lora_dims", "training",
        "architecture_version",
    }  # fmt: skip
    assert "/" not in content["model_file"]


@pytest.mark.parametrize("name", SIZES)
def test_the_model_of_a_preset_has_the_published_tensors(name: str) -> None:
    with torch.device("meta"):
        model = build_model(load_model_config(name).dimensions, initial_values=False)
    built = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    published = published_tensors(SIZES[name])
    assert built.keys() - published.keys() == {f"blocks.0.att.v{i}" for i in range(3)}
    assert {n: built[n] for n in published} == published
    counted = sum(prod(shape) for shape in published.values())
    assert counted == SIZES[name]["parameters"]
    assert counted == check_configs.PARAMETERS[name]
    assert round(counted / 1e9, 3) == SIZES[name]["billions"]


def test_there_are_these_six_and_each_has_two_names() -> None:
    names = [alias for name in SIZES for alias in (name.partition("-")[2], name)]
    assert list(list_available_models()) == names


def test_the_check_ends_with_the_number_that_passed(capsys: pytest.CaptureFixture[str]) -> None:
    assert rwkvtune(["configs", "check"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "6/6 passed"
    for line, name in zip(lines, SIZES, strict=True):
        assert line.startswith(f"pass  {name} ")
        assert f"{SIZES[name]['parameters']:,} parameters in" in line


def test_a_released_preset_that_is_wrong_or_gone_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rwkv7-0.1b", "rwkv7-0.4b"):
        content = json.loads((BUILTIN_FOLDER / f"{name}.json").read_text())
        if name == "rwkv7-0.4b":
            content["lora_dims"]["dim_gate_lora"] = 160  # what a formula says, not the weights
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr("rwkvtune.configs.model_loader.BUILTIN_FOLDER", tmp_path)
    monkeypatch.setattr(
        check_configs, "PARAMETERS", dict(list(check_configs.PARAMETERS.items())[:3])
    )
    assert check_configs.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["pass", "rwkv7-0.1b"], ["FAIL", "rwkv7-0.4b"], ["FAIL", "rwkv7-1.5b"],
    ]  # fmt: skip
    assert "452,340,736 parameters, expected 450,767,872" in lines[1]
    assert lines[3] == "1/3 passed"
