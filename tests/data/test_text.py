"""Token files from text, read back with nothing but numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rwkvtune.data.binidx import BinIdx
from rwkvtune.data.text import build_from_text, read_documents
from rwkvtune.data.tokenizers import ByteTokenizer, find_tokenizer
from rwkvtune.errors import UserError


def ids_in(path: Path) -> list[int]:
    ids: list[int] = np.fromfile(path, "<u2").tolist()
    return ids


def as_bytes(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()] + [0]


def test_a_text_file_is_one_document_cut_where_nanogpt_cuts(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1005)) + "é\r\n"
    (tmp_path / "in.txt").write_bytes(text.encode())
    built = build_from_text(tmp_path / "in.txt", tmp_path / "out" / "x", "bytes", val_share=0.1)
    cut = int(0.9 * len(text))
    assert ids_in(tmp_path / "out" / "x.bin") == as_bytes(text[:cut])
    assert ids_in(tmp_path / "out" / "x_val.bin") == as_bytes(text[cut:])
    assert built.validation is not None
    assert (built.train.documents, built.train.tokens, built.train.text_bytes) == (1, cut + 1, cut)
    assert built.validation.text_bytes == len(text.encode()) - cut
    assert BinIdx(tmp_path / "out" / "x", vocab_size=257).sizes.tolist() == [cut + 1]


def test_lines_of_json_are_documents_and_stay_whole(tmp_path: Path) -> None:
    documents = ["first\nwith lines", "", "über\u2028", "a" * 30, "last"]
    lines = [json.dumps({"text": document, "other": 1}) for document in documents]
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines) + "\n  \n", encoding="utf-8")
    assert read_documents(tmp_path / "in.jsonl") == documents
    built = build_from_text(tmp_path / "in.jsonl", tmp_path / "x", ByteTokenizer(), val_share=0.2)
    expected = [as_bytes(document) for document in documents]
    assert ids_in(tmp_path / "x.bin") == sum(expected[:3], [])
    assert ids_in(tmp_path / "x_val.bin") == sum(expected[3:], [])
    assert BinIdx(tmp_path / "x").sizes.tolist() == [len(ids) for ids in expected[:3]]
    assert built.validation is not None
    assert built.validation.documents == 2


def test_a_character_vocabulary_covers_both_parts_and_is_found_beside_them(tmp_path: Path) -> None:
    built = build_from_text(["aabbz"], tmp_path / "x", "chars", val_share=0.2)
    assert ids_in(tmp_path / "x.bin") == [1, 1, 2, 2, 0]
    assert ids_in(tmp_path / "x_val.bin") == [3, 0]
    for prefix in ("x", "x_val"):
        found = find_tokenizer(tmp_path / prefix)
        assert found is not None
        assert found.to_json() == built.tokenizer.to_json()


def test_without_a_share_there_is_no_validation_file(tmp_path: Path) -> None:
    built = build_from_text(["abc"], tmp_path / "x.bin", "bytes")
    assert built.validation is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"", "holds no text"),
        ("in.jsonl", b"\n \n", "holds no text"),
        ("in.txt", b"abc\xff", r"in\.txt: byte 3 \(0xff\) is not UTF-8"),
        ("in.jsonl", b'{"text": "a"}\n\n{"text": }', r"in\.jsonl: line 3: not JSON"),
        ("in.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"in\.jsonl: line 2: expected \{\"text\""),
        ("in.jsonl", b'["a"]', r"line 1: expected"),
        ("in.jsonl", b'{"text": 5}', r"line 1: expected"),
        ("in.jsonl", b'{"text": "\xe9"}', r"line 1: byte 10 \(0xe9\) is not UTF-8"),
        ("in.csv", b"a", r"expected a \.txt or \.jsonl file"),
    ],
)
def test_input_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_from_text(tmp_path / name, tmp_path / "x", "bytes")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_document_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b\\ud800"}\n')
    with pytest.raises(UserError, match=r"document 1: character 1 of the text is '\\ud800'"):
        build_from_text(tmp_path / "in.jsonl", tmp_path / "x", "bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*in\.txt"):
        build_from_text(tmp_path / "in.txt", tmp_path / "x", "bytes")


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="expected a share from 0 to below 1"):
        build_from_text(["abc"], tmp_path / "x", "bytes", val_share=share)


@pytest.mark.parametrize("documents", [["a"], ["a", ""], ["", "abc"]])
def test_a_share_that_leaves_one_side_empty_is_refused(
    tmp_path: Path, documents: list[str]
) -> None:
    with pytest.raises(UserError, match="leaves nothing for training or for validation"):
        build_from_text(documents, tmp_path / "x", "bytes", val_share=0.5)
