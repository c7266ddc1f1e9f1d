"""Records of LLaVA's format, whatever file they come in; the published converter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rwkvtune.cli.main import guarded
from rwkvtune.data import llava
from rwkvtune.data.llava import RecordFile, picture_names, stream_records
from rwkvtune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECORDS: list[dict[str, Any]] = [
    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": 'x "]}, \\ ü 😀'}]},
    {"id": "2", "n": [1, 2.5e-3, {"deep": [[]]}], "conversations": [], "text": "a\nb\u2028c"},
    {"id": "ü", "image": ["b.jpg", "sub/c.jpg"], "conversations": None},
]


def forms(records: list[dict[str, Any]]) -> dict[str, bytes]:
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return {
        "array.json": json.dumps(records, ensure_ascii=False).encode(),
        "escaped.json": json.dumps(records).encode(),
        "indented.json": json.dumps(records, indent=2, ensure_ascii=False).encode(),
        "marked.json": b"\xef\xbb\xbf" + json.dumps(records, ensure_ascii=False).encode(),
        "object.json": json.dumps({"info": {"v": 1}, "n": 5, "data": records, "z": 0}).encode(),
        "lines.jsonl": lines.encode(),
        "lines-marked.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode(),
        "lines-named.json": lines.encode(),
        "unended.jsonl": lines.rstrip("\n").encode(),
    }


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", forms(RECORDS))
def test_every_form_gives_the_same_records_in_blocks_of_any_size(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava, "BLOCK_BYTES", block)
    path = tmp_path / name
    path.write_bytes(forms(RECORDS)[name])
    file = RecordFile(path)
    assert [file[i] for i in range(len(file))] == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"id": 1}, {"id": ', "is damaged near byte 12"),
        ("a.json", b'[{"id": 1} {"id": 2}]', "expected ',', found '{'"),
        ("a.json", b'[{"id": 1}, 7]', "byte 12 is no JSON object"),
        ("a.json", b'[{"id": 1}] [{"id": 2}]', "near byte 12: expected the end of the file"),
        ("a.json", b'[{"id": "\xff"}]', "not UTF-8"),
        ("a.json", b'{"id": 1}', "without a list"),
        ("a.json", b"", "expected '['"),
        ("a.jsonl", b'{"id": 1}\n{"id": \n', "line 2 is no JSON"),
        ("a.jsonl", b'{"id": 1}\n[]\n', "line 2 is no JSON object"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(reason)):
        list(stream_records(path))


def test_a_record_names_no_picture_one_or_several() -> None:
    assert picture_names({"image": "a.jpg"}) == ["a.jpg"]
    assert picture_names({"image": ["a.jpg", "b.jpg"]}) == ["a.jpg", "b.jpg"]
    assert picture_names({}) == picture_names({"image": ""}) == picture_names({"image": None}) == []
    with pytest.raises(UserError, match="expected a file name"):
        picture_names({"image": 5})


def door(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "convert_chat_json_to_jsonl.py", *map(str, args)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def test_the_published_converter_runs_as_documented(tmp_path: Path) -> None:
    source, target = tmp_path / "chat.json", tmp_path / "chat.jsonl"
    source.write_text(json.dumps(RECORDS))
    (tmp_path / "a.jpg").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("images/b.jpg", b"")
    done = door(source, target, "--check-images")
    assert done.returncode == 0, done.stderr
    assert f"3 records from {source} to {target}" in done.stdout
    assert "3 pictures, 1 of them not in" in done.stdout
    assert "missing: sub/c.jpg" in done.stdout
    lines = target.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == RECORDS and lines[-1] == ""
    first = target.read_bytes()
    assert guarded("convert_chat", [str(source), str(target)]) == 0
    assert target.read_bytes() == first


def test_the_published_converter_ends_with_1_for_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in ([], ["a.json"], ["a", "b", "c"], [str(tmp_path / "no.json"), "x.jsonl"]):
        assert guarded("convert_chat", args) == 1
        assert "usage: convert_chat_json_to_jsonl.py" in capsys.readouterr().err


def test_a_failed_conversion_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "chat.json", tmp_path / "chat.jsonl"
    source.write_text('[{"id": 1}, {"id":')
    target.write_text("old")
    assert guarded("convert_chat", [str(source), str(target)]) == 2
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat.json", "chat.jsonl"]
    assert guarded("convert_chat", [str(source), str(source)]) == 2
    source.write_text('[{"id": 1}]')
    monkeypatch.chdir(tmp_path)
    assert guarded("convert_chat", [str(source), "."]) == 2, "a folder"
