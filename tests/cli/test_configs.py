"""`rwkvtune configs` and what `inspect` says of presets, on files of the released sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkvtune.checkpoint import save_weights
from rwkvtune.cli.main import main as rwkvtune
from rwkvtune.configs import load_model_config
from rwkvtune.models import RWKV6Config, RWKV7Config, build_model
from tests.configs.released import SIZES, published_tensors, sparse_safetensors

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("architecture", "lora_dims", "training")

READS_NO_VALUES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # a gibibyte in all
from rwkvtune.cli.main import main
for command in (["configs", "from-checkpoint"], ["inspect"]):
    assert main([*command, sys.argv[1]]) == 0
assert "torch" not in sys.modules and "numpy" not in sys.modules
with open("/proc/self/status") as file:  # the highest of this program; getrusage's is its parent's
    print([int(line.split()[1]) for line in file if line.startswith("VmHWM")][0], file=sys.stderr)
"""


def sparse_pth(path: Path, name: str) -> Path:
    """What torch.save writes for a released model in bf16, with holes for its data."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        tensors = published_tensors(SIZES[name]).items()
        torch.save({n: torch.empty(shape, dtype=torch.bfloat16) for n, shape in tensors}, path)
    return path


@pytest.mark.parametrize("write", [sparse_pth, sparse_safetensors])
def test_a_file_of_26_gigabytes_is_told_without_its_values(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rwkv7-g0b-13.3b-20251130-ctx8192.pth", "rwkv7-13.3b")
    assert path.stat().st_size > 2 * SIZES["rwkv7-13.3b"]["parameters"]
    done = subprocess.run(
        [sys.executable, "-c", READS_NO_VALUES, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) < 64 * 1024  # KiB, of which Python itself takes a part
    block, _, told = done.stdout.partition("\nfile ")
    builtin = load_model_config("13.3b").config_dict
    assert {s: json.loads(block)[s] for s in SECTIONS} == {s: builtin[s] for s in SECTIONS}
    assert "\npreset      rwkv7-13.3b\n" in told


@pytest.mark.parametrize("name", SIZES)
def test_the_preset_written_from_a_released_file_is_the_one_that_comes_with_us(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sparse_safetensors(tmp_path / SIZES[name]["model_file"], name)
    target = tmp_path / "rwkv7-mine.json"
    assert rwkvtune(["configs", "from-checkpoint", str(path), "--output", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    written, builtin = load_model_config(str(target)), load_model_config(name)
    assert written.model_path == str(path)
    for section in SECTIONS:
        assert written.config_dict[section] == builtin.config_dict[section]
    assert rwkvtune(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["presets"] == [name]


def test_ranks_that_no_preset_has_are_written_and_named_by_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RWKV7Config(97, 2, 64, decay_rank=16, a_rank=24, v_rank=8, g_rank=40)
    path = tmp_path / "odd.pth"
    save_weights(path, build_model(config, seed=0).state_dict())
    assert rwkvtune(["configs", "from-checkpoint", str(path)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["lora_dims"] == {
        "dim_att_lora": 16, "dim_gate_lora": 40, "dim_mv_lora": 8, "dim_a_lora": 24,
    }  # fmt: skip
    assert "ctx_len" not in content["architecture"]  # nothing says which
    assert content["training"]["recommended_lr"] == 1e-5
    elsewhere = tmp_path / "presets" / "rwkv7-odd.json"
    assert rwkvtune(["configs", "from-checkpoint", str(path), "--output", str(elsewhere)]) == 0
    assert f"odd.pth is not looked for in {tmp_path}" in capsys.readouterr().err
    assert load_model_config(str(elsewhere)).dimensions == config
    assert rwkvtune(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"preset      none; rwkvtune configs from-checkpoint {path} writes one" in shown


def test_what_is_no_whole_rwkv7_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RWKV7Config(97, 2, 64)
    weights = build_model(config, seed=0).state_dict()
    whole, finch = tmp_path / "whole.pth", tmp_path / "finch.pth"
    save_weights(whole, weights)
    save_weights(finch, build_model(RWKV6Config(97, 2, 64), seed=0).state_dict())
    cut, gaps = tmp_path / "cut.pth", tmp_path / "gaps.pth"
    cut.write_bytes(whole.read_bytes()[:-5000])
    save_weights(gaps, {n: w for n, w in weights.items() if n != "blocks.1.att.k_k"})
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "there.json").write_text("{}")
    for argv, complaint in [
        ([str(finch)], 'holds RWKV-6 "Finch" x060, and presets are for RWKV-7 x070'),
        ([str(cut)], str(cut)),
        ([str(gaps)], "is no whole RWKV-7: missing: blocks.1.att.k_k"),
        ([str(tmp_path / "text.pth")], "is not a weights file"),
        ([str(tmp_path / "none.pth")], "there is no file"),
        ([str(whole), "--output", str(tmp_path / "there.json")], "give --overwrite"),
        ([str(whole), "--output", str(tmp_path / "there.yaml")], "ends in .json"),
    ]:
        assert rwkvtune(["configs", "from-checkpoint", *argv]) == 2
        told = capsys.readouterr()
        assert complaint in told.err and told.err.count("\n") == 1 and not told.out, told
    assert (tmp_path / "there.json").read_text() == "{}"


def test_a_preset_that_is_broken_is_left_out_of_the_list_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rwkv7-broken.json").write_text('{"architecture": {}}')
    monkeypatch.setenv("RWKVTUNE_MODELS", str(tmp_path))
    assert rwkvtune(["configs", "list"]) == 2
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1 + 6 and "rwkv7-broken.json is no preset" in told.err
    assert rwkvtune(["configs", "check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("FAIL  rwkv7-broken") and lines[-1] == "6/7 passed"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["lst"], "unknown command configs lst: did you mean list?"),
        (["show", "1.6b"], "did you mean"),
        (["show", "1.5b", "--repo", "a/b"], "give --download too"),
        (["list", "--dir", "no/such"], "there is no folder no/such"),
        (["check", "no/such"], "there is no folder no/such"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rwkvtune(["configs", *argv]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1
