"""A run folder as `rwkvtune train` leaves it, for the commands that read one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvtune.cli.main import main


@pytest.fixture(scope="session")
def run_folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of training on the bundled text; do not change it."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("run") / "out"
    assert main([
        "train", "--data_file", str(text), "--proj_dir", str(folder), "--n_layer", "2",
        "--n_embd", "64", "--ctx_len", "32", "--micro_bsz", "2", "--exit_tokens", "128",
        "--threads", "1", "--precision", "fp32",
    ]) == 0  # fmt: skip
    torch.set_num_threads(threads)
    return folder
