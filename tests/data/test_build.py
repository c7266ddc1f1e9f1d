"""Token files from text: order, validation, repetition and interruption, read back with nothing but
numpy and the standard library."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvtune.data import build
from rwkvtune.data.binidx import BinIdx
from rwkvtune.data.build import Built, build_token_files
from rwkvtune.data.tokenizers import ByteTokenizer, find_tokenizer
from rwkvtune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def ids_in(path: Path) -> list[int]:
    ids: list[int] = np.fromfile(path, "<u2").tolist()
    return ids


def documents_in(prefix: Path) -> list[str]:
    """Written with the bytes tokenizer: cut at the zeros, each byte one less."""
    content = np.fromfile(f"{prefix}.bin", "<u2")
    ends = np.flatnonzero(content == 0)
    assert ends[-1] == len(content) - 1
    parts = np.split(content, ends + 1)[:-1]
    assert BinIdx(prefix).sizes.tolist() == [len(part) for part in parts]
    return [bytes((part[:-1] - 1).astype(np.uint8)).decode() for part in parts]


def as_bytes(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()] + [0]


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_file_is_one_document_cut_where_nanogpt_cuts(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1005)) + "é\r\n"
    (tmp_path / "in.txt").write_bytes(text.encode())
    built = build_token_files(tmp_path / "in.txt", tmp_path / "out" / "x", "bytes", val_share=0.1)
    cut = int(0.9 * len(text))
    assert ids_in(tmp_path / "out" / "x.bin") == as_bytes(text[:cut])
    assert ids_in(tmp_path / "out" / "x_val.bin") == as_bytes(text[cut:])
    assert built.validation is not None
    assert (built.train.documents, built.train.tokens, built.train.text_bytes) == (1, cut + 1, cut)
    assert built.validation.text_bytes == len(text.encode()) - cut
    assert built.validation.longest == len(text.encode()) - cut + 1
    assert built.train.bytes_per_token == 1.0
    assert BinIdx(tmp_path / "out" / "x", vocab_size=257).sizes.tolist() == [cut + 1]
    assert names(tmp_path / "out") == sorted(
        f"{name}.{end}" for name in ("x", "x_val") for end in ("bin", "idx", "tokenizer.json")
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_single_document_is_cut_at_the_same_character_in_every_kind_of_file(
    tmp_path: Path, share: float
) -> None:
    text = "日本語 abc\n" * 200
    jsonl(tmp_path / "a.jsonl", [text])
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text.encode()))
    cut = int(len(text) * (1 - share))
    for i, name in enumerate(names(tmp_path)):
        build_token_files(tmp_path / name, tmp_path / "out" / str(i), "bytes", val_share=share)
        assert documents_in(tmp_path / "out" / str(i)) == [text[:cut]]
        assert documents_in(tmp_path / "out" / f"{i}_val") == [text[cut:]]


def test_several_documents_stay_whole(tmp_path: Path) -> None:
    documents = ["first\nwith lines", "", "über\u2028", "a" * 30, "last"]
    jsonl(tmp_path / "in.jsonl", documents)
    built = build_token_files(tmp_path / "in.jsonl", tmp_path / "x", "bytes", val_share=0.2)
    assert documents_in(tmp_path / "x") == documents[:3]
    assert documents_in(tmp_path / "x_val") == documents[3:]
    assert built.validation is not None
    assert built.validation.documents == 2
    assert built.notes == ["documents without text, each kept as its end-of-document token: 1"]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.text(max_size=12), min_size=2, max_size=12),
    share=st.sampled_from([0.0, 0.1, 0.4, 0.8]),
    n_epoch=st.integers(1, 3),
    seed=st.one_of(st.none(), st.integers(0, 5)),
)
def test_training_holds_the_other_documents_as_often_and_as_shuffled_as_asked(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[str],
    share: float,
    n_epoch: int,
    seed: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    documents = [f"{i}{text}" for i, text in enumerate(documents)]
    source = jsonl(folder / "in.jsonl", documents)
    try:
        built = build_token_files(
            source, folder / "x", "bytes", val_share=share, n_epoch=n_epoch, seed=seed
        )
    except UserError as error:
        assert "leaves nothing for training" in str(error) and share
        return
    validation = documents_in(folder / "x_val") if share else []
    kept = [text for text in documents if text not in validation]
    assert [text for text in documents if text in validation] == validation
    wanted = []
    shuffled, generator = list(kept), random.Random(seed)
    for _ in range(n_epoch):
        if seed is not None:
            generator.shuffle(shuffled)
        wanted += shuffled
    assert documents_in(folder / "x") == wanted
    total = sum(1 + len(text.encode()) for text in documents)
    held = sum(1 + len(text.encode()) for text in validation)
    tenths = round(10 * share)
    assert tenths * total <= 10 * held
    if seed is None:
        assert documents == kept + validation
        if share:  # without the first of them it would be less than was asked for
            assert 10 * (held - 1 - len(validation[0].encode())) < tenths * total
    assert built.train.tokens == n_epoch * (total - held)
    assert built.train.text_bytes == built.train.tokens - built.train.documents


def test_another_seed_draws_other_documents_for_validation(tmp_path: Path) -> None:
    documents = [f"document {i}" for i in range(50)]
    jsonl(tmp_path / "in.jsonl", documents)
    drawn = []
    for seed in (1, 2):
        build_token_files(tmp_path / "in.jsonl", tmp_path / "x", "bytes", val_share=0.2, seed=seed)
        drawn.append(documents_in(tmp_path / "x_val"))
    assert drawn[0] != drawn[1]
    assert drawn[0] == sorted(drawn[0], key=documents.index)
    assert len(drawn[0]) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_and_compressed_files_give_the_ids_of_the_plain_text(
    tmp_path: Path, workers: int
) -> None:
    documents = [f"{i} Ünï\r\n日本 {'long ' * (i % 7)}" for i in range(60)]
    plain = jsonl(tmp_path / "plain.jsonl", documents)
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "0.jsonl", documents[:20])
    content = jsonl(tmp_path / "x.jsonl", documents[20:30]).read_bytes()
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(content))
    content = jsonl(tmp_path / "x.jsonl", documents[30:40]).read_bytes()
    (folder / "2.jsonl.zst").write_bytes(zstandard.compress(content))
    (folder / "3.txt").write_bytes(documents[40].encode())
    (folder / "4.txt.gz").write_bytes(gzip.compress(documents[41].encode()))
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"text": documents[42:]}), folder / "5.parquet")
    options: dict[str, Any] = {"seed": 5, "val_share": 0.1, "n_epoch": 2}
    build_token_files(plain, tmp_path / "a", "world", **options)
    build_token_files(folder, tmp_path / "b", "world", workers=workers, **options)
    for end in (".bin", ".idx", "_val.bin", "_val.idx", ".tokenizer.json"):
        assert (
            Path(f"{tmp_path / 'a'}{end}").read_bytes()
            == Path(f"{tmp_path / 'b'}{end}").read_bytes()
        )


def test_a_long_text_gives_the_same_ids_in_parts_in_processes_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "One sentence, and 日本語 too.\r\n" * 45_000 + "GATTACA" * 200_000
    (tmp_path / "in.txt").write_bytes(text.encode())
    from rwkvtune.data import text as reading
    from rwkvtune.data.tokenizers import base

    for name, workers in (("a", 0), ("b", 2)):
        build_token_files(tmp_path / "in.txt", tmp_path / name, "world", workers=workers)
    monkeypatch.setattr(base, "PIECE_BYTES", 1 << 30)
    monkeypatch.setattr(reading, "_BATCH_BYTES", 1 << 30)
    build_token_files(tmp_path / "in.txt", tmp_path / "whole", "world")
    whole = (tmp_path / "whole.bin").read_bytes()
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == whole
    assert BinIdx(tmp_path / "a").sizes.tolist() == [len(whole) // 2]


def test_the_characters_are_those_of_training_and_validation_and_kept_beside_both(
    tmp_path: Path,
) -> None:
    (tmp_path / "in.txt").write_text("aabbz")
    built = build_token_files(tmp_path / "in.txt", tmp_path / "x", "chars", val_share=0.2)
    assert ids_in(tmp_path / "x.bin") == [1, 1, 2, 2, 0]
    assert ids_in(tmp_path / "x_val.bin") == [3, 0]
    for prefix in ("x", "x_val"):
        found = find_tokenizer(tmp_path / prefix)
        assert found is not None
        assert found.to_json() == built.tokenizer.to_json()


def test_ids_above_16_bits_make_files_of_int32(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").write_text("70000 'a' 1\n2 'b' 1\n")
    (tmp_path / "in.txt").write_text("aba")
    build_token_files(tmp_path / "in.txt", tmp_path / "x", str(tmp_path / "vocabulary.txt"))
    assert np.fromfile(tmp_path / "x.bin", "<i4").tolist() == [70000, 2, 70000, 0]
    assert BinIdx(tmp_path / "x", vocab_size=70001).dtype == np.int32


def test_a_null_character_is_not_the_end_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"a\0b")
    for tokenizer in ("world", "bytes", "chars"):
        build_token_files(tmp_path / "in.txt", tmp_path / "x", tokenizer)
        ids = ids_in(tmp_path / "x.bin")
        assert len(ids) == 4 and ids.count(0) == 1 and ids[-1] == 0
        found = find_tokenizer(tmp_path / "x")
        assert found is not None and found.decode(ids) == "a\0b"


def test_what_the_user_may_want_to_know_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    with jsonl(tmp_path / "b.jsonl", ["", "x"]).open("a") as file:
        file.write("\n \n\n")

    def built(share: float) -> Built:
        return build_token_files(tmp_path, tmp_path / "out" / "x", "bytes", val_share=share)

    assert built(0.2).notes == [
        "blank lines, passed over: 3",
        "files that begin with a byte order mark, kept as text (U+FEFF): 1",
        "documents without text, each kept as its end-of-document token: 1",
    ]
    assert documents_in(tmp_path / "out" / "x") + documents_in(tmp_path / "out" / "x_val") == [
        "\ufeffabc",
        "",
        "x",
    ]
    again = built(0.0).notes
    assert again[0].startswith("passed over, hidden or no text by their names: 6 (")
    assert again[1] == f"replaced the token files of {tmp_path / 'out' / 'x'} that were there"
    assert "x_val.bin is from an earlier build, and left alone" in again[2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "share 1": ({"val_share": 1.0}, "expected a share from 0 to below 1"),
    "share below 0": ({"val_share": -0.1}, "expected a share from 0 to below 1"),
    "no number": ({"val_share": float("nan")}, "expected a share from 0 to below 1"),
    "share of one letter": ({"val_share": 0.5}, "leaves nothing for training or for validation"),
    "no epoch": ({"n_epoch": 0}, "n_epoch=0: expected 1 or more"),
    "seed": ({"seed": -1}, "seed=-1: expected 0 or more"),
    "workers": ({"workers": -1}, "workers=-1: expected 0 or more"),
    "prefix": ({"prefix": "out/"}, "'out/' names no files: expected a prefix such as data/my"),
    "tokenizer": ({"tokenizer": "char"}, "unknown tokenizer 'char'"),
    "no input": ({"inputs": "nothing.txt"}, "no such file or folder: 'nothing.txt'"),
    "empty": ({"inputs": "empty.txt"}, "empty.txt: holds no text"),
    "empty, chars": ({"inputs": "empty.txt", "tokenizer": "chars"}, "empty.txt: holds no text"),
    "empty, share": ({"inputs": "empty.txt", "val_share": 0.5}, "empty.txt: holds no text"),
    "blank": ({"inputs": "blank.jsonl", "val_share": 0.5}, "blank.jsonl: holds no text"),
    "surrogate": ({"inputs": "half.jsonl"}, "half.jsonl: line 2: character 1 of the text is '\\ud"),
    "surrogate, chars": (
        {"inputs": "half.jsonl", "tokenizer": "chars"},
        "half.jsonl: line 2: character 1 of the text is '\\ud800'",
    ),
    "vocabulary": (
        {"tokenizer": "vocabulary.txt", "inputs": "long.txt"},
        # The first part ends with the last place in the first 2^20 bytes where it can be cut.
        "long.txt: in the part from byte 1048575 on: no token of the vocabulary fits at byte 475",
    ),
    "output is input": ({"inputs": "in.txt", "prefix": "own"}, "would be replaced by the output"),
    "no folder": ({"prefix": "in.txt/x"}, "cannot write into in.txt"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_work_is_one_error_and_writes_nothing(
    tmp_path: Path, case: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = REFUSED[case]
    if workers and "inputs" not in changes:
        pytest.skip("needs no processes")
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("a")
    Path("empty.txt").touch()
    Path("blank.jsonl").write_text("\n \n")
    Path("half.jsonl").write_text('{"text": "a"}\n{"text": "b\\ud800"}\n')
    Path("vocabulary.txt").write_text("1 'a' 1\n2 ' ' 1\n")
    Path("long.txt").write_text("a " * 524_525 + "z")
    if case == "output is input":
        os.symlink("in.txt", "own.bin")
    before = names(tmp_path)
    arguments: dict[str, Any] = {
        "inputs": "in.txt", "prefix": "x", "tokenizer": "bytes", "workers": workers,
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        build_token_files(**arguments | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_of_two_mistakes_the_first_is_told(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"a\.jsonl: line 2"):
        build_token_files(tmp_path, tmp_path / "out" / "x", "bytes", workers=workers)


def test_a_failed_build_leaves_the_older_files_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("good text")
    build_token_files(tmp_path / "in.txt", tmp_path / "x", "bytes", val_share=0.5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "bad.txt").write_bytes(b"good, and \xff")
    with pytest.raises(UserError):
        build_token_files(tmp_path / "bad.txt", tmp_path / "x", "bytes", val_share=0.5)
    (tmp_path / "bad.txt").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_tokenizing_process_that_is_killed_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.txt").write_text("text")
    monkeypatch.setattr(build, "_begin_process", os._exit)  # as if the system had ended it
    with pytest.raises(UserError, match="use fewer than 2 workers"):
        build_token_files(tmp_path / "in.txt", tmp_path / "x", "bytes", workers=2)
    assert names(tmp_path) == ["in.txt"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds child processes by /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_build_that_is_stopped_leaves_no_file_and_no_process(
    tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    source = tmp_path / "in.jsonl"
    os.mkfifo(source)  # which we keep open, so that the build cannot come to its end
    out = tmp_path / "out"
    command = ["data", "build", str(source), "--output", str(out / "x"), "--tokenizer", "bytes"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkvtune", *command, "--workers", str(workers)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with open(source, "wb") as pipe:
        line = json.dumps({"text": "text " * 1000}).encode() + b"\n"
        for _ in range(2000):  # more than a batch for each process, and the pipe's own buffer
            pipe.write(line)
        pipe.flush()
        children = children_of(process.pid)
        code = None
        while code is None:  # Python sleeps over a signal that comes just before it reads a pipe
            # Ctrl-C in a terminal reaches the children too.
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=2)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert names(out) == []
    deadline = time.monotonic() + 600
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "a child is still there"
        time.sleep(0.05)
    assert (len(children) >= workers) if workers else not children
    assert process.stderr is not None
    told = process.stderr.read()
    if number != signal.SIGKILL:
        assert told == ("stopped\n" if number == signal.SIGINT else "")


def children_of(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["case_small_vocab", "case_odd_lines"])
def test_make_data_bytes_are_those_of_the_fixture(name: str, golden: Path, tmp_path: Path) -> None:
    content = json.loads((golden / "make_data.json").read_text())
    case = content[name]
    lines = case.get("input_jsonl", content["input_jsonl"])
    (tmp_path / "in.jsonl").write_bytes(lines.encode())
    (tmp_path / "vocabulary.txt").write_text(content["vocab_small"], encoding="utf-8")
    for workers in (0, 2):
        build_token_files(
            tmp_path / "in.jsonl",
            tmp_path / "x",
            str(tmp_path / "vocabulary.txt"),
            seed=case["seed"],
            n_epoch=case["n_epoch"],
            workers=workers,
        )
        assert (tmp_path / "x.bin").read_bytes() == base64.b64decode(case["bin_base64"])
        assert (tmp_path / "x.idx").read_bytes() == base64.b64decode(case["idx_base64"])


def test_progress_ends_with_all_bytes_read(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["x" * 500] * 5000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text " * 1_000_000))
    seen: list[build.Progress] = []
    build_token_files(tmp_path, tmp_path / "out" / "x", ByteTokenizer(), on_progress=seen.append)
    tokenizing = [progress for progress in seen if progress.step == "tokenizing"]
    assert tokenizing[-1].done_bytes == tokenizing[-1].total_bytes
    assert [p.done_bytes for p in tokenizing] == sorted(p.done_bytes for p in tokenizing)
    assert seen[-1].step == "writing"
