"""The published program's pipeline; `python tests/test_pipeline_simple.py` runs this file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_trainer import DataConfig, ModelConfig, RWKVTrainingPipeline, TrainingConfig


def test_the_published_defaults() -> None:
    model, training = ModelConfig(), TrainingConfig()
    assert (model.model_type, model.n_layer, model.n_embd) == ("x060", 3, 128)
    assert (model.ctx_len, model.vocab_size) == (1024, 361)
    assert (training.lr_init, training.lr_final, training.micro_bsz) == (6e-4, 6e-5, 16)
    assert (training.grad_cp, training.precision) == (1, "bf16")


def test_a_pipeline_makes_its_folders_and_keeps_its_settings(tmp_path: Path) -> None:
    RWKVTrainingPipeline(
        work_dir=tmp_path / "work",
        model_config=ModelConfig(n_layer=2, n_embd=64),
        training_config=TrainingConfig(lr_init=1e-3),
        wandb_project="test_project",
    )
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"configs", "data", "out"}
    config = json.loads((tmp_path / "work/configs/config.json").read_text())
    assert (config["model"]["n_layer"], config["training"]["lr_init"]) == (2, 1e-3)
    assert config["wandb_project"] == "test_project"


def test_data_are_prepared_from_an_array_and_from_a_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 360, size=(30, 15))
    np.save(tmp_path / "data.npy", data)
    pipeline = RWKVTrainingPipeline(
        work_dir=tmp_path / "work", data_config=DataConfig(sequence_length=15)
    )
    result = pipeline.prepare_data_from_file(tmp_path / "data.npy", "train")
    assert pipeline.data_prepared and pipeline.my_exit_tokens == 30 * 16
    assert result["num_sequences"] == 30
    assert pipeline.prepare_data(data) == result


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
