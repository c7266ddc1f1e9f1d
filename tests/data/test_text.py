"""Documents out of files of every kind, against the bytes that were put in by other programs."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from rwkvtune.data.text import find_files, read_batches
from rwkvtune.data.tokenizers import ByteTokenizer
from rwkvtune.errors import MissingFileError, UserError

DOCUMENTS = [
    "first\r\nwith lines\r",
    "",
    "über\u2028 \x00",
    "a" * 30,
    '{"text": "\\"}',
    "\ufefflast",
]
LINES = "\n\n".join(json.dumps({"text": d, "n": 1}) for d in DOCUMENTS).encode() + b"\r\n  \n"


def documents(*names: Path | str, key: str = "text") -> list[str]:
    found: list[str] = []
    goes_on = False
    for batch in read_batches(find_files(names)[0], key=key, last_cut=ByteTokenizer().last_cut):
        texts = batch.documents().texts
        if goes_on:
            found[-1] += texts.pop(0)
        found += texts
        goes_on = batch.unfinished
    return found


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zstd_of_unknown_size(content: bytes) -> bytes:
    """As `zstd < in > out` writes it, whose frames do not tell their size; two frames."""
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    return compressor.compress(content[:20]) + compressor.compress(content[20:])


def gzip_of_two_members(content: bytes) -> bytes:
    return gzip.compress(content[:20]) + gzip.compress(content[20:])


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip_of_two_members,
    ".zst": zstd_of_unknown_size,
    ".ZST": zstandard.compress,
}


@pytest.mark.parametrize("suffix", PACKED)
def test_text_and_lines_are_the_same_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    text = "".join(DOCUMENTS) * 20
    write(tmp_path / f"a.txt{suffix}", PACKED[suffix](text.encode()))
    write(tmp_path / f"b.jsonl{suffix}", PACKED[suffix](LINES))
    assert documents(tmp_path / f"a.txt{suffix}") == [text]
    assert documents(tmp_path / f"b.jsonl{suffix}") == DOCUMENTS


@pytest.mark.parametrize("as_type", ["string", "large_string", "dictionary"])
def test_rows_of_parquet_are_documents(tmp_path: Path, as_type: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    column = pa.array(DOCUMENTS * 500)
    column = column.dictionary_encode() if as_type == "dictionary" else column.cast(as_type)
    table = pa.table({"n": list(range(len(column))), "text": column, "body": column})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=700)
    assert documents(tmp_path / "x.parquet") == DOCUMENTS * 500
    assert documents(tmp_path / "x.parquet", key="body") == DOCUMENTS * 500


def test_a_long_text_comes_in_parts_that_make_up_the_whole(tmp_path: Path) -> None:
    text = "".join(f"{i} ünd\r\n" for i in range(400_000))
    assert documents(write(tmp_path / "a.txt", text.encode())) == [text]
    parts = list(
        read_batches(
            find_files([tmp_path / "a.txt"])[0], key="text", last_cut=ByteTokenizer().last_cut
        )
    )
    assert len(parts) > 3 and all(part.unfinished for part in parts[:-1])
    assert max(len(part.documents().texts[0].encode()) for part in parts) < 2_100_000
    assert sum(part.read_bytes for part in parts) == len(text.encode())


def test_a_text_without_a_place_to_cut_comes_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x" * 3_000_000)
    (batch,) = read_batches(
        find_files([tmp_path / "a.txt"])[0], key="text", last_cut=lambda encoded: 0
    )
    assert batch.documents().texts == ["x" * 3_000_000]


def test_a_text_file_can_be_cut_at_any_byte_where_a_character_begins(tmp_path: Path) -> None:
    content = "0123456789é".encode() * 200_000
    files, _ = find_files([write(tmp_path / "a.txt", content)])
    for cut_at in (10, 12, 1_048_572, 1_200_000, len(content) - 12):
        found: list[list[str]] = [[]]
        for batch in read_batches(
            files, key="text", last_cut=ByteTokenizer().last_cut, cut_at=cut_at
        ):
            for text in batch.documents().texts:
                found[-1].append(text)
                if not batch.unfinished:
                    found.append([])
        first, second, rest = ("".join(parts).encode() for parts in found)
        assert (first, second, rest) == (content[:cut_at], content[cut_at:], b"")


def test_thousands_of_small_files_travel_in_few_batches(tmp_path: Path) -> None:
    for i in range(300):
        write(tmp_path / f"{i:03}.txt", f"text {i}".encode())
    batches = list(
        read_batches(find_files([tmp_path])[0], key="text", last_cut=ByteTokenizer().last_cut)
    )
    assert len(batches) == 1
    assert batches[0].documents().texts == [f"text {i}" for i in range(300)]


def test_folders_and_globs_are_read_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["b.txt", "a/z.txt", "a/b/c.jsonl", "a/README.md", ".cache/x.txt", "a/.hidden.txt"]
    for name in names:
        content = b'{"text": "a/b/c.jsonl"}' if name.endswith("l") else name.encode()
        write(tmp_path / name, content)
    os.symlink(tmp_path / "a", tmp_path / "a/b/loop")
    assert documents(".") == ["a/b/c.jsonl", "a/z.txt", "b.txt"]
    assert documents("b.txt", "a") == ["b.txt", "a/b/c.jsonl", "a/z.txt"]
    assert documents("**/*.txt") == ["a/z.txt", "b.txt"]
    assert documents("a/*") == ["a/b/c.jsonl", "a/z.txt"]
    assert documents("a/.hidden.txt") == ["a/.hidden.txt"]
    write(tmp_path / "[odd] *.txt", b"a name that looks like a glob")
    assert documents("[odd] *.txt") == ["a name that looks like a glob"]


def test_what_is_passed_over_or_named_twice_is_told(tmp_path: Path) -> None:
    for name in ("a.txt", "b.csv", ".c.txt", ".d/e.txt"):
        write(tmp_path / name, b"x")
    os.symlink(tmp_path / "a.txt", tmp_path / "z.txt")
    files, notes = find_files([tmp_path])
    assert [file.path.name for file in files] == ["a.txt"]
    assert notes[0].endswith(f"3 ({tmp_path}/.c.txt, {tmp_path}/.d, {tmp_path}/b.csv)")
    assert notes[1] == f"named more than once, used once: 1 ({tmp_path}/z.txt)"
    files, notes = find_files([f"{tmp_path}/**", tmp_path / "a.txt"])
    assert [file.path.name for file in files] == ["a.txt"]
    assert "used once: 2 " in notes[-1]
    assert find_files([tmp_path / "a.txt"])[1] == []


CUT = gzip.compress(os.urandom(5000))[:3000]
REFUSED = {
    "no.txt": (None, "no such file or folder"),
    "*.foo": (None, "matches no file"),
    "in.csv": (b"a", "expected .txt, .jsonl"),
    "in.parquet.gz": (b"a", "expected .txt, .jsonl"),
    "in.txt": (b"abc\xff", "in.txt: byte 3 (0xff) is not UTF-8"),
    "long.txt": (b"a\n" * 1_000_000 + b"\xff", "long.txt: byte 2000000 (0xff) is not UTF-8"),
    "a.jsonl": (b'{"text": "a"}\n\n{"text": }', "a.jsonl: line 3: not JSON"),
    "a2.jsonl": (b'{"text": "a', "line 1: not JSON (Unterminated string starting at column 10)"),
    "b.jsonl": (b'{"text": "a"}\n{"txt": "b"}', 'b.jsonl: line 2: expected {"text": "..."}'),
    "c.jsonl": (b'["a"]', "c.jsonl: line 1: expected"),
    "d.jsonl": (b'{"text": 5}', "d.jsonl: line 1: expected"),
    "e.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', "e.jsonl: line 2: byte 10 (0xe9) is not UTF-8"),
    "f.jsonl": (b"[" * 200_000, "f.jsonl: line 1: cannot be read as JSON (maximum recursion"),
    "g.jsonl": (b'{"body": "a"}', "The fields here are body: call the one with the text 'text'"),
    "h.jsonl": (b'{"text": "a"}\n' * 100_000 + b"x", "h.jsonl: line 100001: not JSON"),
    "cut.txt.gz": (CUT, "cut.txt.gz: ends in the middle"),
    "cut.txt.zst": (zstandard.compress(b"some text" * 99)[:20], "cut.txt.zst: ends in the middle"),
    "no.jsonl.gz": (b"plain", "no.jsonl.gz: cannot be read: Not a gzipped file"),
    "no.jsonl.zst": (b"plain", "no.jsonl.zst: cannot be read: zstd"),
    "no.parquet": (b"plain", "no.parquet: cannot be read: Parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_error_that_names_it(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    if name == "no.parquet":
        pytest.importorskip("pyarrow")
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        documents(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingFileError) == (content is None)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", b"x")
    with pytest.raises(UserError, match=r"no file of text there: expected \.txt"):
        find_files([tmp_path])


@pytest.mark.parametrize(
    ("values", "message"),
    [(["a", None], "row 2: text is null"), ([1, 2], "column 'text' is int64, expected string")],
)
def test_a_column_that_is_no_text_is_refused(
    tmp_path: Path, values: list[object], message: str
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        documents(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has no column 'body'; there are text"):
        documents(tmp_path / "x.parquet", key="body")
