"""Every command, import, table and file of the published document on the configuration system."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvtune.cli import train_with_config
from rwkvtune.cli.main import guarded
from rwkvtune.cli.main import main as rwkvtune
from rwkvtune.cli.train_with_config import main as train_script
from rwkvtune.configs import load_model_config
from rwkvtune.configs.preset import BUILTIN_FOLDER
from rwkvtune.models import RWKV7Config, build_model

ROOT = Path(__file__).resolve().parents[2]

FIRST_LINE = "NO WEIGHTS GIVEN: trying the path on a tiny random model"

LOADING = """
from rwkvtune.configs.model_loader import load_model_config

# Load 1.5B model configuration
config = load_model_config("1.5b")

print(f"Model: {config.model_name}")
print(f"Layers: {config.n_layer}")
print(f"Hidden dim: {config.n_embd}")
print(f"Model path: {config.model_path}")
"""

LISTING = """
from rwkvtune.configs.model_loader import list_available_models

available = list_available_models()
for key, path in available.items():
    print(f"{key}: {path}")
"""

ANALYSING = """
import torch
ckpt = torch.load("model.pth", map_location='cpu')
# Inspect n_layer, n_embd, LORA dimensions, etc.
"""

AVAILABLE = """
| 0.1B | 12 | 768 | ~0.1B | rwkv7-0.1b.json |
| 0.4B | 24 | 1024 | ~0.4B | rwkv7-0.4b.json |
| 1.5B | 24 | 2048 | ~1.5B | rwkv7-1.5b.json |
| 2.9B | 32 | 2560 | ~2.9B | rwkv7-2.9b.json |
| 7.2B | 32 | 4096 | ~7.2B | rwkv7-7.2b.json |
| 13.3B | 61 | 4096 | ~13.3B | rwkv7-13.3b.json |
"""

RECOMMENDED = """
| 0.1B | 1024 | 8 | 3e-4 |
| 0.4B | 1024 | 4 | 1e-4 |
| 1.5B | 1024 | 2 | 1e-5 |
| 2.9B | 1024 | 1 | 5e-6 |
| 7.2B | 1024 | 1 | 1e-6 |
| 13.3B | 512 | 1 | 1e-6 |
"""

FILE_FORMAT = """
{
  "model_name": "RWKV7-1.5B",
  "model_file": "rwkv7-g1-1.5b-20250429-ctx4096.pth",
  "description": "RWKV7 1.5B parameter model",

  "architecture": {
    "n_layer": 24,
    "n_embd": 2048,
    "vocab_size": 65536,
    "head_size_a": 64,
    "ctx_len": 4096
  },

  "lora_dims": {
    "dim_att_lora": 96,
    "dim_gate_lora": 256,
    "dim_mv_lora": 64
  },

  "training": {
    "recommended_ctx_len": 1024,
    "recommended_batch_size": 2,
    "recommended_lr": 1e-05
  }
}
"""


def in_a_clone(
    tmp_path: Path, command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a published command line in a folder with the examples, our python first on the PATH."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def rows(table: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.split("\n") if line]


def test_the_script_tries_the_path_where_there_are_no_weights(tmp_path: Path) -> None:
    done = in_a_clone(tmp_path, "bash examples/train_with_config.sh 0.1b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == FIRST_LINE
    (folder,) = tmp_path.glob("output_*")
    assert re.fullmatch(r"output_0\.1b_tryout_\d{8}_\d{6}", folder.name)
    losses = [float(x) for x in re.findall(r"  loss ([\d.]+)  ", done.stdout)]
    assert losses[-1] < losses[0] - 0.5  # a random model of 65536 ids begins near ln 65536 = 11.09
    weights = torch.load(folder / "rwkv-final.pth", weights_only=True)
    assert weights["emb.weight"].shape == (65536, 64)


@pytest.mark.parametrize("size", ["0.4b", "13.3B", "RWKV7-2.9B"])
def test_each_size_can_be_tried(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def become(program: str, arguments: list[str]) -> None:
        assert [program, *arguments[1:3]] == [sys.executable, "-m", "rwkvtune"]
        raise SystemExit(rwkvtune(arguments[3:]))

    monkeypatch.setattr("os.execv", become)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        train_script([size, "--exit_tokens", "128", "--threads", "1"])
    torch.set_num_threads(threads)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(FIRST_LINE + "\n")
    (folder,) = tmp_path.iterdir()
    short = size.lower().removeprefix("rwkv7-")
    assert re.fullmatch(rf"output_{re.escape(short)}_tryout_\d{{8}}_\d{{6}}", folder.name)


def test_the_script_trains_the_users_data_and_weights(tmp_path: Path) -> None:
    content = json.loads((BUILTIN_FOLDER / "rwkv7-0.1b.json").read_text())
    content["architecture"] |= {"n_layer": 2, "n_embd": 64}
    (tmp_path / "rwkv7-mine.json").write_text(json.dumps(content | {"model_file": "none.pth"}))
    config = RWKV7Config(65536, 2, 64, decay_rank=64, a_rank=64, v_rank=32, g_rank=128)
    torch.save(build_model(config, seed=3).state_dict(), tmp_path / "mine.pth")
    (tmp_path / "my.jsonl").write_text('{"text": "%s"}\n' % ("To be or not to be. " * 300))
    command = "bash examples/train_with_config.sh ./rwkv7-mine.json --ctx_len 16 --exit_tokens 256"
    done = in_a_clone(tmp_path, command, DATA="my.jsonl", WEIGHTS="mine.pth")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("output_*")
    assert re.fullmatch(r"output_mine_\d{8}_\d{6}", folder.name)
    assert "NO WEIGHTS" not in done.stdout and "weights of mine.pth" in done.stdout
    assert "micro_bsz 8, lr_init 0.0003" in done.stdout
    assert "ctx_len 1024 (not followed: ctx_len 16)" in done.stdout
    assert (folder / "rwkv-final.pth").exists()


@pytest.mark.parametrize(
    ("argv", "environment", "complaint"),
    [
        (["0.2b"], {}, "no preset '0.2b'"),
        (["--epoch_count", "1"], {}, "the size comes first"),
        (["0.1b", "--epoch_cnt", "1"], {}, "epoch_cnt (did you mean epoch_count?)"),
        (["0.1b", "--ctx_len", "0"], {}, "ctx_len=0 must be at least 1"),
        (["0.1b"], {"DATA": "my.txt"}, "rwkvtune configs show rwkv7-0.1b --download"),
        (["0.1b"], {"WEIGHTS": "w.pth"}, "but no data"),
        (["0.1b"], {"DATA": "my.txt", "WEIGHTS": "w.pth"}, "there is no file w.pth"),
        (["0.1b"], {"DATA": "no.txt", "WEIGHTS": "tiny.pth"}, "n_layer"),
        (["tiny.json"], {"DATA": "no.txt", "WEIGHTS": "tiny.pth"}, "DATA=no.txt: there is no such"),
        (["tiny.json"], {"DATA": "my.txt", "WEIGHTS": "tiny.pth"}, "make token files of my.txt"),
    ],
)
def test_what_the_script_cannot_use_is_said_before_anything_is_written(
    argv: list[str],
    environment: dict[str, str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "my.txt").write_text("some text")
    config = RWKV7Config(97, 2, 64)
    torch.save(build_model(config, seed=0).state_dict(), tmp_path / "tiny.pth")
    guarded("configs", ["from-checkpoint", "tiny.pth", "--output", "tiny.json"])
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert guarded("train_with_config", argv) == 2
    told = capsys.readouterr()
    assert complaint in told.err and told.err.startswith("error: ")
    assert not told.out and sorted(tmp_path.iterdir()) == before


def test_the_published_test_script_ends_with_six_of_six(tmp_path: Path) -> None:
    done = in_a_clone(tmp_path, "python examples/test_model_configs.py")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "6/6 passed")
    assert len(done.stdout.splitlines()) == 7


def test_the_published_python_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(LOADING, {})
    assert capsys.readouterr().out == (
        "Model: RWKV7-1.5B\nLayers: 24\nHidden dim: 2048\n"
        "Model path: rwkv7-g1-1.5b-20250429-ctx4096.pth\n"
    )
    exec(LISTING, {})
    listed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert listed["1.5b"] == listed["rwkv7-1.5b"] == str(BUILTIN_FOLDER / "rwkv7-1.5b.json")
    model = build_model(RWKV7Config(97, 2, 64), seed=0)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    exec(ANALYSING, {})
    from rwkvtune.configs import (  # noqa: F401
        ModelConfig,
        list_available_models,
        load_model_config,
        print_model_info,
    )


def test_the_published_tables_are_those_of_the_presets() -> None:
    for size, layers, width, about, file in rows(AVAILABLE):
        config = load_model_config(size)
        assert (config.n_layer, config.n_embd) == (int(layers), int(width))
        assert about.strip("~") == size and (BUILTIN_FOLDER / file).is_file()
    for size, ctx_len, batch_size, lr in rows(RECOMMENDED):
        config = load_model_config(size)
        shown = (config.recommended_ctx_len, config.recommended_batch_size, config.recommended_lr)
        assert shown == (int(ctx_len), int(batch_size), float(lr))


def test_the_published_file_is_the_preset_of_the_1_5b(tmp_path: Path) -> None:
    (tmp_path / "rwkv7-1.5b.json").write_text(FILE_FORMAT)
    published = load_model_config("1.5B", config_dir=str(tmp_path))
    builtin = load_model_config("1.5b").config_dict
    assert builtin == published.config_dict | {"architecture_version": "rwkv7"}


@pytest.mark.parametrize(
    "path",
    [
        "examples/train_with_config.sh", "examples/test_model_configs.py",
        "rwkvtune/models/rwkv7/model.py", "rwkvtune/models/rwkv7/config.py",
        "rwkvtune/configs/model_loader.py", "rwkvtune/configs/__init__.py",
        "rwkvtune/configs/README.md",
    ],
)  # fmt: skip
def test_a_file_that_the_document_names_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_a_tryout_of_the_same_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_with_config, "_now", lambda: "now")
    (tmp_path / "output_0.1b_tryout_now").mkdir()
    assert guarded("train_with_config", ["0.1b"]) == 2
    assert "output_0.1b_tryout_now exists" in capsys.readouterr().err
