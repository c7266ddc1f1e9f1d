"""The published program's converters; `python tests/test_data_converter_simple.py` runs this
file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_trainer import (
    AngleTokenizer,
    DataPipeline,
    JsonlToBinIdxConverter,
    NumpyToJsonlConverter,
)


def test_rows_become_lines(tmp_path: Path) -> None:
    data = np.array([[0, 45, 90], [135, 180, 225], [270, 315, 359]])
    path = NumpyToJsonlConverter().convert(data, tmp_path / "test.jsonl")
    lines = Path(path).read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["0 45 90", "135 180 225", "270 315 359"]


def test_lines_become_token_files(tmp_path: Path) -> None:
    lines = [json.dumps({"text": " ".join(map(str, range(100)))}) for _ in range(100)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    converter = JsonlToBinIdxConverter(AngleTokenizer())
    prefix = converter.convert(tmp_path / "test.jsonl", tmp_path / "test", n_epochs=1)
    info = converter.get_data_info(prefix)
    assert (info["num_items"], info["total_tokens"]) == (100, 10100)
    # 202 windows of 50; 197 = 3 * 65 + 2 is the largest such prime below.
    assert converter.compute_magic_prime(prefix, ctx_len=50) == 197


def test_both_steps_at_once(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 360, size=(50, 20))
    result = DataPipeline().process(
        data=data, output_dir=tmp_path, name="test", sequence_length=20, n_epochs=2
    )
    assert (result["num_sequences"], result["total_tokens"]) == (100, 2100)
    for path in (result["jsonl_path"], result["binidx_prefix"] + ".bin", result["vocab_path"]):
        assert Path(path).is_file()


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
