"""A run that was stopped at any moment and started again is the run that was never stopped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.training.runs import Blow, flags, outcome, run

SETTINGS = {
    "n_layer": 2, "n_embd": 64, "ctx_len": 32, "threads": 1,
    "epoch_steps": 6, "epoch_count": 3, "epoch_save": 2, "save_every": 4, "keep_last": 2,
    "val_every": 5, "val_windows": 3, "sample_every": 7, "sample_tokens": 5, "log_every": 1,
    "warmup_steps": 3,
}  # fmt: skip

CASES = {
    "published, fp32, accumulated": {
        "order": "published", "precision": "fp32", "micro_bsz": 2, "accumulate_grad_batches": 2,
    },
    "shuffled, bf16": {"order": "shuffled", "precision": "bf16", "micro_bsz": 4},
    "shuffled, fp32, accumulated, bf16 files": {
        "order": "shuffled", "precision": "fp32", "micro_bsz": 1, "accumulate_grad_batches": 3,
        "save_dtype": "bf16",
    },
    "x052, shuffled, fp32": {
        "version": "x052", "order": "shuffled", "precision": "fp32", "micro_bsz": 4,
    },
    "x060, published, bf16, documents, recomputed": {
        "version": "x060", "mix_rank": 8, "order": "published", "precision": "bf16",
        "micro_bsz": 3, "reset_at_documents": "true", "grad_cp": "true",
    },
    "published, bf16, documents, recomputed": {
        "order": "published", "precision": "bf16", "micro_bsz": 3, "reset_at_documents": "true",
        "grad_cp": "true",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments_of_writing_a_run_ends_as_if_never_stopped(
    case: str, text: Path, tmp_path: Path
) -> None:
    args = ["train", *flags(SETTINGS | CASES[case] | {"data_file": text})]
    args += ["--val_data_file", f"{text}_val"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = run([*args, "--proj_dir", str(whole)], tmp_path / "out")
    assert ended.code == 0, ended.output
    dice = random.Random(case)
    for _ in range(5):
        blow = Blow(dice.randint(1, 90), str(killed))
        ended = run([*args, "--proj_dir", str(killed)], tmp_path / "out", blow)
        assert ended.code in (-9, 0), ended.output
    ended = run([*args, "--proj_dir", str(killed)], tmp_path / "out")
    assert ended.code == 0, ended.output
    result, expected = outcome(killed), outcome(whole)
    for part in expected:
        assert result[part] == expected[part]


def test_killed_between_its_first_two_files_a_run_keeps_its_own_initial_values(
    text: Path, tmp_path: Path
) -> None:
    """rwkv-init.pth in bf16 is not what the run began with, its resume state is."""
    sizes = {"data_file": text, "micro_bsz": 2, "epoch_count": 1, "save_dtype": "bf16"}
    args = ["train", *flags(SETTINGS | sizes)]
    for name, blow in (
        ("whole", None),
        ("before the state", Blow(1, "/resume")),
        ("before the weights", Blow(1, "rwkv-init.pth")),
    ):
        folder = ["--proj_dir", str(tmp_path / name)]
        assert run([*args, *folder], tmp_path / "out", blow).code == (0 if blow is None else -9)
        assert run([*args, *folder], tmp_path / "out").code == 0
        assert outcome(tmp_path / name) == outcome(tmp_path / "whole"), name
