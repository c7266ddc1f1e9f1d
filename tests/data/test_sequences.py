"""From arrays and lines to token files, against numpy and the standard library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvtune.data.binidx import BinIdx
from rwkvtune.data.sequences import (
    DataPipeline,
    JsonlToBinIdxConverter,
    NumpyToJsonlConverter,
    load_array,
)
from rwkvtune.data.tokenizers.generic import GenericTokenizer, create_vocab_file_from_tokens
from rwkvtune.data.tokenizers.integers import AngleTokenizer, IntegerTokenizer
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.pipeline import RWKVTrainingPipeline


def texts(path: str | Path) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def documents(prefix: str) -> list[list[int]]:
    """Ids of each document, by numpy and the published layout alone."""
    ids = np.fromfile(prefix + ".bin", "<u2").tolist()
    found: list[list[int]] = [[]]
    for id in ids:
        if id == 0:
            found.append([])
        else:
            found[-1].append(id)
    assert found.pop() == [], "a file ends with the end of a document"
    return found


@pytest.mark.parametrize("kind", ["uint8", "int16", "int64", "uint64", "float32", ">i4"])
def test_any_type_of_whole_numbers_becomes_lines_of_digits(tmp_path: Path, kind: str) -> None:
    rows = [[0, 45, 90], [135, 180, 225]]
    path = NumpyToJsonlConverter().convert(np.array(rows, kind), tmp_path / "x.jsonl")
    assert texts(path) == ["0 45 90", "135 180 225"]


def test_one_dimension_is_cut_and_the_remainder_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = NumpyToJsonlConverter().convert(np.arange(7), tmp_path / "x.jsonl", sequence_length=3)
    assert texts(path) == ["0 1 2", "3 4 5", "6"]
    assert "2 sequences of 3 values, and a last one with the remaining 1" in capsys.readouterr().out
    assert texts(NumpyToJsonlConverter().convert(np.arange(3), path)) == ["0 1 2"]


def test_rows_may_have_different_lengths_and_a_transform_takes_any_value(tmp_path: Path) -> None:
    path = NumpyToJsonlConverter().convert([[1, 2, 3], [4]], tmp_path / "x.jsonl")
    assert texts(path) == ["1 2 3", "4"]
    rows = np.empty(2, object)
    rows[:] = [1, 2], [3]
    assert texts(NumpyToJsonlConverter().convert(rows, path)) == ["1 2", "3"]
    np.save(tmp_path / "x.npy", np.array([[0.26, 0.99]]))
    halves = NumpyToJsonlConverter(lambda value: str(round(2 * value)))
    assert texts(halves.convert_file(tmp_path / "x.npy", path)) == ["1 2"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([[1, 2], [3, 2.5]], "2.5 in row 1, position 1 is not a whole number"),
        ([1, float("nan")], "nan at index 1 is not a whole number"),
        ([["a", "b"]], "'a' in row 0, position 0 is not a whole number"),
        ([[1, 2], [3, 10]], r"must be in \[0, 9\], got 10 in row 1, position 1"),
        ([[1, -2]], "got -2 in row 0, position 1. Shift the values"),
        ([1, 10, 12], r"got 10 at index 1. Use IntegerTokenizer\(max_value=12\)"),
        ([[2**70]], "too large for a vocabulary"),
        ([], "the data are empty"),
        (np.zeros((2, 2, 2), int), r"shape \(2, 2, 2\)"),
        (7, r"shape \(\)"),
        ("x.npy", "the text 'x.npy'.*prepare_data_from_file"),
        (np.ma.masked_equal([[1, 2], [3, 2]], 2), "2 masked values"),
        ([[[1], [2]], [[3]]], "row 0 of the data is no row of numbers"),
        ([1, [2, 3]], "row 0 of the data is no row of numbers"),
        (torch.ones(2, 2, requires_grad=True), r"the data are no array .*detach"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_written(
    tmp_path: Path, data: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        DataPipeline(IntegerTokenizer(9)).process(data, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_values_that_a_vocabulary_lacks_are_named_before_anything_is_written(
    tmp_path: Path,
) -> None:
    vocabulary = create_vocab_file_from_tokens(["1", " "], tmp_path / "vocab.txt")
    pipeline = DataPipeline(GenericTokenizer(vocabulary))
    with pytest.raises(UserError, match="row 1 of the data: no token of the vocabulary fits"):
        pipeline.process([[1, 1], [1, 2]], tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert pipeline.process([[1, 1], [1, 1]], tmp_path / "data")["total_tokens"] == 8


def test_an_angle_out_of_range_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 360 in row 0, position 1. Take it modulo 360"):
        DataPipeline(AngleTokenizer()).process([[0, 360]], tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"txt": "1"}', r'line 2: expected \{"text"'),
        ('{"text": 5}', "line 2: expected"),
        ("1 2 3", "line 2"),
        ('{"text": "1 11"}', r"line 2: Value must be in \[0, 9\], got 11 at position 1"),
        ('{"text": "hello"}', "line 2: 'hello' at position 0 is not a whole number"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, said: str) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "1 2"}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        DataPipeline(IntegerTokenizer(9)).process_jsonl(source, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.bin"))


def test_files_that_hold_nothing_usable_are_named(tmp_path: Path) -> None:
    converter = JsonlToBinIdxConverter()
    with pytest.raises(MissingFileError, match="no such file"):
        converter.convert(tmp_path / "absent.jsonl", tmp_path / "x")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        converter.convert(tmp_path / "x.json", tmp_path / "x")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        converter.convert(tmp_path / "empty.jsonl", tmp_path / "x")
    with pytest.raises(UserError, match=r"is no \.npy file.*b'\[\]'"):
        load_array(tmp_path / "x.json")
    np.save(tmp_path / "x.npy", np.array([None]))
    with pytest.raises(UserError, match="holds Python objects"):
        load_array(tmp_path / "x.npy")
    for take in (load_array, lambda path: converter.convert(path, tmp_path / "x")):
        with pytest.raises(UserError, match="is a folder"):
            take(tmp_path)
    np.savez(tmp_path / "x.npz", a=np.arange(2), b=np.arange(2))
    with pytest.raises(UserError, match=r"several arrays \(a, b\)"):
        load_array(tmp_path / "x.npz")


def test_every_sequence_is_written_as_often_as_asked_in_another_order(tmp_path: Path) -> None:
    data = np.arange(200).reshape(40, 5)
    pipeline = DataPipeline(IntegerTokenizer(199))
    result = pipeline.process_numpy(data, tmp_path, "train", sequence_length=10, n_epochs=3)
    written = documents(result["binidx_prefix"])
    expected = sorted((data + 1).tolist())
    epochs = [written[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert (result["num_sequences"], result["total_tokens"]) == (120, 120 * 6)
    # 72 windows: 71 = 3 * 23 + 2 is prime.
    assert result["magic_prime"] == 71
    assert texts(result["jsonl_path"])[0] == "0 1 2 3 4"
    again = pipeline.process_numpy(data, tmp_path / "again", "train", 10, 3)
    assert documents(again["binidx_prefix"]) == written


def test_held_out_sequences_are_whole_and_not_trained_on(tmp_path: Path) -> None:
    data = np.arange(200).reshape(40, 5)
    result = DataPipeline(IntegerTokenizer(199)).process_numpy(
        data, tmp_path, n_epochs=2, val_share=0.25
    )
    train, kept = documents(result["binidx_prefix"]), documents(result["val_prefix"])
    assert len(kept) == result["val_sequences"] == 10
    assert sorted(train) == sorted(2 * [row for row in (data + 1).tolist() if row not in kept])


def test_lines_can_be_written_in_their_order(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "7 8"}\n{"text": "3"}\n')
    converter = JsonlToBinIdxConverter(IntegerTokenizer(9))
    prefix = converter.convert(source, tmp_path / "out", n_epochs=2, shuffle=False)
    assert documents(prefix) == [[8, 9], [4], [8, 9], [4]]
    info = converter.get_data_info(prefix)
    assert info == {"num_items": 4, "total_tokens": 10, "dtype": "uint16"}
    assert converter.compute_magic_prime(prefix, ctx_len=2) == 2  # 5 windows, 4 at most
    assert converter.compute_magic_prime(prefix, ctx_len=4) is None


@pytest.mark.parametrize("n_epochs", [0, -1, 1.5, "2"])
def test_sequences_cannot_be_written_fewer_times_than_once(tmp_path: Path, n_epochs: Any) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "7 8"}\n')
    for convert in (
        lambda: JsonlToBinIdxConverter().convert(source, tmp_path / "out", n_epochs),
        lambda: RWKVTrainingPipeline(tmp_path).prepare_data_from_jsonl(source, n_epochs=n_epochs),
    ):
        with pytest.raises(UserError, match=f"n_epochs={n_epochs!r} must be a whole number from 1"):
            convert()
    assert not list(tmp_path.rglob("*.bin"))


def test_values_above_16_bits_make_files_of_32_bits(tmp_path: Path) -> None:
    result = DataPipeline(IntegerTokenizer(65535)).process([[65534, 65535]], tmp_path)
    assert BinIdx(result["binidx_prefix"]).tokens.tolist() == [65535, 65536, 0]


def test_what_is_no_tokenizer_is_refused() -> None:
    for given in (IntegerTokenizer, object(), "absent"):
        with pytest.raises(UserError, match="tokenizer"):
            DataPipeline(given)  # type: ignore[arg-type]
    assert DataPipeline("bytes").tokenizer.vocab_size == 257
