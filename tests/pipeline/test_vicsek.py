"""The example of docs/sequences.md at a tiny size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rwkvtune.errors import UserError
from rwkvtune.pipeline import IntegerTokenizer, ModelConfig, RWKVTrainingPipeline
from rwkvtune.pipeline.vicsek import NOISE_DEGREES, error, main, simulate


def test_headings_keep_to_a_direction_within_the_noise() -> None:
    headings = simulate(flocks=3, steps=40, seed=0)
    assert headings.shape == (60, 40) and headings.min() >= 0 and headings.max() <= 359
    # Of a flock, a step turns a heading by the difference of two even draws from +-30 degrees,
    # which is a third of 60 in the mean, and more by what the mean moves.
    turns = error(headings[:, 1:], headings[:, :-1])
    assert NOISE_DEGREES / 3 * 0.9 < turns < NOISE_DEGREES / 3 * 1.2
    assert not np.array_equal(headings, simulate(flocks=3, steps=40, seed=1))


def test_angles_are_compared_around_the_circle() -> None:
    assert error(np.array([359, 10, 180]), np.array([1, 350, 0])) == (2 + 20 + 180) / 3


def test_the_example_runs_and_prints_the_three_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--flocks", "1", "--steps", "16", "--epochs", "1", "--n_embd", "32"]
    assert main([*tiny, "--work_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "copy of the last heading" in said and "best constant" in said
    assert main([*tiny, "--work_dir", str(tmp_path)]) == 2
    assert "holds a run of 1 epochs" in capsys.readouterr().err


def test_next_values_are_told_for_every_position(tmp_path: Path) -> None:
    pipeline = RWKVTrainingPipeline(
        tmp_path,
        ModelConfig("x070", n_layer=1, n_embd=32, ctx_len=8, head_size_a=16, vocab_size=32),
        tokenizer=IntegerTokenizer(9),
    )
    rows = np.arange(20).reshape(2, 10) % 10
    pipeline.prepare_data(rows)
    pipeline.initialize_model()
    found = pipeline.next_value_probabilities(rows)
    assert found.shape == (2, 10, 10)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    changed = rows.copy()
    changed[:, 5:] = 0
    again = pipeline.next_value_probabilities(changed)
    np.testing.assert_allclose(again[:, :5], found[:, :5], rtol=1e-5)  # the past alone counts
    with pytest.raises(UserError, match="rows of one length"):
        pipeline.next_value_probabilities([1, 2, 3])
