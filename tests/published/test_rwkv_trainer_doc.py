"""Every example of rwkv_trainer's published document, run as printed, one after the other, with
smaller numbers where the table SMALLER says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkvtune.checkpoint import save_weights
from rwkvtune.models import CONFIGS, build_model, config_from_shapes
from rwkvtune.pipeline import RWKVTrainingPipeline, load_checkpoint_for_training

SMALLER = {
    "size=(1000, 1024)": "size=(12, 100)",
    "num_epochs=100": "num_epochs=1",
    "num_epochs=50": "num_epochs=1",
    "num_epochs=200": "num_epochs=2",
    "'ctx_len': 2048": "'ctx_len': 512",
    "/path/to/pretrained_model.pth": "pretrained_model.pth",
    "/path/to/any/rwkv-model.pth": "pretrained_model.pth",
    "/path/to/model.pth": "pretrained_model.pth",
}

QUICK_START_1 = """
from rwkv_trainer import RWKVTrainingPipeline, ModelConfig, IntegerTokenizer
import numpy as np

# Create custom tokenizer for values 0-999
tokenizer = IntegerTokenizer(max_value=999)

# Create data
data = np.random.randint(0, 1000, size=(1000, 1024))

# Train
pipeline = RWKVTrainingPipeline(
    work_dir="./experiment",
    model_config=ModelConfig(n_layer=3, n_embd=128, vocab_size=1001),
    tokenizer=tokenizer
)
pipeline.train(data, num_epochs=100)
"""

QUICK_START_2 = """
from rwkv_trainer import RWKVTrainingPipeline

pipeline = RWKVTrainingPipeline(work_dir="./experiment")

# Prepare from existing JSONL (each line: {"text": "1 2 3 ..."})
pipeline.prepare_data_from_jsonl("my_data.jsonl")

# Train
pipeline.train(num_epochs=100)
"""

QUICK_START_3 = """
from rwkv_trainer import (
    RWKVTrainingPipeline, 
    GenericTokenizer,
    create_vocab_file_from_tokens
)

# Create custom vocab
tokens = ['hello', 'world', 'foo', 'bar', ' ']
create_vocab_file_from_tokens(tokens, "custom_vocab.txt")

# Use custom tokenizer
tokenizer = GenericTokenizer("custom_vocab.txt")
pipeline = RWKVTrainingPipeline(
    work_dir="./experiment",
    tokenizer=tokenizer
)
"""  # noqa: W291

QUICK_START_4 = """
from rwkv_trainer import RWKVTrainingPipeline

pipeline = RWKVTrainingPipeline(work_dir="./experiment")

# Prepare your data
pipeline.prepare_data_from_jsonl("your_data.jsonl")

# Resume from any RWKV-LM checkpoint (auto-detect architecture)
pipeline.train_from_checkpoint(
    checkpoint_path="/path/to/pretrained_model.pth",
    num_epochs=50  # Fine-tune for 50 more epochs
)
"""

INTEGERS = """
from rwkv_trainer import IntegerTokenizer

# Values 0-999 mapped to tokens 1-1000, token 0 = end_of_doc
tokenizer = IntegerTokenizer(max_value=999)
tokens = tokenizer.encode_sequence([0, 100, 500, 999])  # [1, 101, 501, 1000]
values = tokenizer.decode_sequence(tokens)               # [0, 100, 500, 999]
"""

GENERIC = """
from rwkv_trainer import GenericTokenizer, create_vocab_file_from_tokens

# Create vocab file
tokens = ['hello', 'world', ' ', '!']
create_vocab_file_from_tokens(tokens, "vocab.txt")

# Load tokenizer
tokenizer = GenericTokenizer("vocab.txt")
tokens = tokenizer.encode("hello world!")  # [1, 2, 3, 4]
"""

ANGLES = """
from rwkv_trainer import AngleTokenizer

tokenizer = AngleTokenizer()
tokens = tokenizer.encode_angle_sequence([0, 45, 90])  # [1, 46, 91]
"""

ADVANCED_1 = """
from rwkv_trainer import RWKVTrainingPipeline

pipeline = RWKVTrainingPipeline(work_dir="./my_experiment")

# Prepare your data
pipeline.prepare_data_from_jsonl("your_data.jsonl")

# Resume from external checkpoint (auto-detect n_layer, n_embd, vocab_size, model_type)
pipeline.train_from_checkpoint(
    checkpoint_path="/path/to/any/rwkv-model.pth",
    num_epochs=100
)
"""

ADVANCED_2 = """
# Auto-detect but override ctx_len (cannot be detected from weights)
pipeline.train_from_checkpoint(
    checkpoint_path="/path/to/model.pth",
    num_epochs=100,
    override_config={
        'ctx_len': 2048,      # Override context length
        'lr_init': 1e-4,      # Override learning rate
    }
)
"""

ADVANCED_3 = """
# Check what the pipeline will detect
info = pipeline.inspect_checkpoint("/path/to/model.pth")

print(f"File size: {info['file_size_mb']:.1f} MB")
print(f"Parameters: {info['num_parameters']:,}")
print(f"Detected config: {info['detected_config']}")
# Output: {'n_layer': 12, 'n_embd': 768, 'vocab_size': 65536, 'model_type': 'x060'}
"""

CONTINUE = """
# Continue training from work_dir's latest checkpoint
pipeline = RWKVTrainingPipeline(work_dir="./existing_experiment")
pipeline.train(num_epochs=200, continue_training=True)
"""

STEP_BY_STEP = """
# Initialize
pipeline = RWKVTrainingPipeline(work_dir="./experiment")

# Step 1: Prepare data
pipeline.prepare_data(data, "train")

# Step 2: Initialize model (Stage 1)
pipeline.initialize_model()

# Step 3: Train (Stage 3)
pipeline.train(num_epochs=100)
"""


def run(example: str, **names: Any) -> dict[str, Any]:
    """Run an example in the current folder; the names that it leaves."""
    for printed, smaller in SMALLER.items():
        example = example.replace(printed, smaller)
    exec(compile(example, "example", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, the current one, with the files that the examples take for granted."""
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).integers(0, 360, size=(12, 100))
    lines = "".join(json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in rows)
    for name in ("my_data.jsonl", "your_data.jsonl"):
        Path(name).write_text(lines)
    yield tmp_path


@pytest.fixture
def pretrained(folder: Path) -> Path:
    """A small x060 model of 400 rows, as RWKV-LM writes them: bf16."""
    config = CONFIGS["x060"].RWKV6Config(vocab_size=400, n_layer=2, n_embd=64)
    path = folder / "pretrained_model.pth"
    save_weights(path, build_model(config, seed=0).state_dict(), dtype="bf16")
    return path


def files(work_dir: str) -> set[str]:
    return {p.relative_to(work_dir).as_posix() for p in Path(work_dir).rglob("*") if p.is_file()}


PUBLISHED_FILES = {
    "configs/config.json", "data/train.jsonl", "data/train.bin", "data/train.idx",
    "data/vocab.txt", "out/rwkv-init.pth", "out/rwkv-0.pth", "out/rwkv-final.pth",
    "out/train_log.txt",
}  # fmt: skip


def test_quick_start_1_trains_on_an_array_and_a_new_object_continues(folder: Path) -> None:
    names = run(QUICK_START_1)
    assert files("experiment") >= PUBLISHED_FILES
    _, detected = load_checkpoint_for_training("experiment/out/rwkv-final.pth")
    assert detected.to_dict() == {
        "n_layer": 3, "n_embd": 128, "vocab_size": 1001, "model_type": "x060",
        "ctx_len": 1024, "head_size_a": 64,
    }  # fmt: skip
    config = json.loads(Path("experiment/configs/config.json").read_text())
    assert config["dataset"]["total_tokens"] == 12 * 101 and config["tokenizer"]["max_value"] == 999
    run(
        CONTINUE.replace("existing_experiment", "experiment"),
        RWKVTrainingPipeline=names["RWKVTrainingPipeline"],
    )
    assert "out/rwkv-1.pth" in files("experiment")


def test_quick_start_2_trains_on_lines() -> None:
    run(QUICK_START_2)
    assert files("experiment") >= PUBLISHED_FILES
    assert Path("experiment/data/train.jsonl").read_bytes() == Path("my_data.jsonl").read_bytes()


def test_quick_start_3_makes_a_vocabulary() -> None:
    assert run(QUICK_START_3)["pipeline"].tokenizer.encode("foo bar") == [3, 5, 4]
    assert Path("custom_vocab.txt").read_text().splitlines()[0] == "0 b'\\x00' 1"


@pytest.mark.parametrize("example", [QUICK_START_4, ADVANCED_1])
def test_weights_from_elsewhere_are_trained_on(example: str, pretrained: Path) -> None:
    pipeline = run(example)["pipeline"]
    assert pipeline.model_config.model_type == "x060" and pipeline.model_config.vocab_size == 400
    assert "out/rwkv-final.pth" in files(str(pipeline.work_dir))
    config = json.loads((pipeline.work_dir / "configs" / "config.json").read_text())
    assert config["model"]["n_layer"] == 2


def test_settings_of_model_and_training_are_overridden(pretrained: Path) -> None:
    pipeline = RWKVTrainingPipeline(work_dir="./my_experiment")
    pipeline.prepare_data_from_jsonl("your_data.jsonl")
    run(ADVANCED_2, pipeline=pipeline)
    assert (pipeline.model_config.ctx_len, pipeline.training_config.lr_init) == (512, 1e-4)


def test_a_checkpoint_is_inspected(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = run(ADVANCED_3, pipeline=RWKVTrainingPipeline("x"))["info"]
    published = {"n_layer": 2, "n_embd": 64, "vocab_size": 400, "model_type": "x060"}
    assert published.items() <= info["detected_config"].items()
    assert "File size: " in capsys.readouterr().out
    assert (
        info["num_parameters"]
        == config_from_shapes(
            {n: tuple(w.shape) for n, w in load_checkpoint_for_training(pretrained)[0].items()}
        ).num_parameters
    )


def test_step_by_step(folder: Path) -> None:
    data = np.random.default_rng(0).integers(0, 360, size=(12, 100))
    run(STEP_BY_STEP, data=data, RWKVTrainingPipeline=RWKVTrainingPipeline)
    assert files("experiment") >= PUBLISHED_FILES


def test_the_tokenizers_give_the_printed_ids() -> None:
    integers = run(INTEGERS)
    assert integers["tokens"] == [1, 101, 501, 1000] and integers["values"] == [0, 100, 500, 999]
    assert run(ANGLES)["tokens"] == [1, 46, 91]
    # Printed is [1, 2, 3, 4], in which 2 would be 'world' in place of the blank.
    generic = run(GENERIC)
    assert generic["tokens"] == [1, 3, 2, 4]
    assert generic["tokenizer"].decode([1, 3, 2, 4]) == "hello world!"


def test_run_tests_sh_runs_the_published_files() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [root / "run_tests.sh"],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert done.stdout.count(" passed") == 3
