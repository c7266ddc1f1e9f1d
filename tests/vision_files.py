"""Tiny files of the true formats for tests of vision training: model, encoder, data set."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rwkvtune.demo.vision_fixture import DATA, ENCODER, MODEL, write_fixture

SETTINGS: dict[str, Any] = {
    "tokenizer": "bytes", "encoder_type": "siglip", "ctx_len": 256, "micro_bsz": 4,
    "epoch_steps": 6, "precision": "fp32", "lr_schedule": "constant", "lr_init": 1e-2,
    "warmup_steps": -1, "threads": 1, "log_every": 1,
}  # fmt: skip
"""A run of 6 steps."""


@cache
def vision_files() -> Path:
    """A folder with all of them, made once: one token per byte, 48 pictures of one colour each."""
    folder = Path(mkdtemp(prefix="rwkvtune-vision-"))
    write_fixture(folder, n_layer=2, n_embd=64, vocab_size=257)
    return folder


def settings(proj_dir: Path, **changes: Any) -> dict[str, Any]:
    """Of a run on these files."""
    files = vision_files()
    return {
        "load_model": str(files / MODEL),
        "encoder_path": str(files / ENCODER),
        "data_file": str(files / DATA),
        "proj_dir": str(proj_dir),
        **SETTINGS,
        **changes,
    }
