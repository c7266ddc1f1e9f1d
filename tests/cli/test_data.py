"""`rwkvtune data`: what it prints, by hand-made files and by those of RWKV-LM's make_data, and what
is refused in one line."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvtune.cli.main import main
from rwkvtune.data.binidx import BinIdxWriter
from rwkvtune.data.report import histogram, printable

ROOT = Path(__file__).resolve().parents[2]
CASES = ["case_small_vocab", "case_single_epoch_small_vocab", "case_world_vocab"]


def facts(printed: str) -> dict[str, str]:
    """`  name    value` lines of one report."""
    found = re.findall(r"^  (\S+(?: \S+)*)  +(.+)$", printed, re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("name", CASES)
def test_build_writes_and_prints_what_make_data_does(
    name: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    content = json.loads((golden / "make_data.json").read_text())
    Path("in.jsonl").write_text(content["input_jsonl"], encoding="utf-8")
    Path("vocabulary.txt").write_text(content["vocab_small"], encoding="utf-8")
    case = content[name]
    tokenizer = "world" if name == "case_world_vocab" else "vocabulary.txt"
    argv = ["in.jsonl", "--output", "out/x", "--tokenizer", tokenizer]
    argv += ["--seed", str(case["seed"]), "--n_epoch", str(case["n_epoch"])]
    assert main(["data", "build", *argv, "--ctx_len", str(case["ctx_len"])]) == 0
    assert Path("out/x.bin").read_bytes() == base64.b64decode(case["bin_base64"])
    assert Path("out/x.idx").read_bytes() == base64.b64decode(case["idx_base64"])
    printed = capsys.readouterr().out
    # make_data's last line is `--my_exit_tokens N --magic_prime P --ctx_len T`.
    upstream = dict(re.findall(r"--(?:my_)?(\w+) (\d+)", case["last_stdout_lines"][-1]))
    command = printed.splitlines()[-1]
    assert command.startswith("  rwkvtune train --data_file out/x ")
    ours = dict(re.findall(r"--(\w+) (\d+)", command))
    assert ours == upstream
    assert "note: blank lines, passed over: 2" in printed
    assert facts(printed)["documents"] == str(case["num_items"])
    assert facts(printed)["tokens"].startswith(f"{case['num_tokens']:,}, one at the end")
    records = [json.loads(line) for line in content["input_jsonl"].splitlines() if line.strip()]
    text_bytes = case["n_epoch"] * sum(len(record["text"].encode()) for record in records)
    assert facts(printed)["text"] == f"{text_bytes:,} bytes"
    per_token = text_bytes / (case["num_tokens"] - case["num_items"])
    assert facts(printed)["bytes per token"] == f"{per_token:.3f}"
    assert facts(printed)["longest document"] == f"{max(case['sizes'])} tokens"


def test_the_printed_command_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text("to be or not to be, that is the question\n" * 40)
    argv = ["my text.txt", "--output", "d/my text", "--tokenizer", "chars", "--val_share", "0.2"]
    assert main(["data", "build", *argv, "--ctx_len", "16"]) == 0
    printed = capsys.readouterr().out
    command = shlex.split(printed.splitlines()[-1])
    assert command[:2] == ["rwkvtune", "train"]
    assert command[command.index("--val_data_file") + 1] == "d/my text_val"
    small = "--n_layer 1 --n_embd 64 --proj_dir out --precision fp32 --accelerator cpu --threads 1"
    threads = torch.get_num_threads()
    assert main([*command[1:], *small.split(), "--exit_tokens", "64", "--micro_bsz", "2"]) == 0
    torch.set_num_threads(threads)
    assert json.loads(Path("out/tokenizer.json").read_text())["kind"] == "chars"


def test_too_little_for_a_magic_prime_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("abc")
    assert main(["data", "build", "a.txt", "--output", "x", "--tokenizer", "bytes"]) == 0
    printed = capsys.readouterr().out
    assert facts(printed)["magic prime"].startswith("none: ctx_len 512 needs at least 1,536 tokens")
    assert "rwkvtune train" not in printed


def test_inspect_counts_as_numpy_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [0, 1, 2, 3, 3, 7, 8, 100, 5000]
    with BinIdxWriter(tmp_path / "x", 300) as writer:
        for i, length in enumerate(lengths):
            ids = np.full(length, 40 + i)
            if i % 2 and length:
                ids[-1] = 0
            writer.add_document(ids)
    assert main(["data", "inspect", str(tmp_path / "x.idx"), "--ctx_len", "16"]) == 0
    printed = capsys.readouterr().out
    assert facts(printed.partition("tokens per document")[0]) == {
        "documents": "9",
        "items": "9",
        "tokens": "5,124 as uint16",
        "largest id": "48",
        "end in 0": "4 of 9 documents",
        "magic prime": "317 for ctx_len 16",
        "tokenizer": "none kept beside the files, and none given by --tokenizer",
    }
    bins = re.findall(r"^ +(\d.*?)  +(\d+) *(#*)$", printed, re.MULTILINE)
    assert bins == [
        ("0", "1", "#" * 14),
        ("1", "1", "#" * 14),
        ("2 - 3", "3", "#" * 40),
        ("4 - 7", "1", "#" * 14),
        ("8 - 15", "1", "#" * 14),
        ("16 - 31", "0", ""),
        ("32 - 63", "0", ""),
        ("64 - 127", "1", "#" * 14),
        ("128 - 255", "0", ""),
        ("256 - 511", "0", ""),
        ("512 - 1,023", "0", ""),
        ("1,024 - 2,047", "0", ""),
        ("2,048 - 4,095", "0", ""),
        ("4,096 - 8,191", "1", "#" * 14),
    ]
    assert "first document, 0 tokens\n    (no text)\n" in printed
    assert "last document, 5,000 tokens\n    ids 48 48 " in printed
    assert printed.endswith(" ... (5,000 in all)\n")


def test_inspect_reads_several_items_as_the_documents_that_they_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As other programs write it: five items, of which two and three are a document."""
    (tmp_path / "x.bin").write_bytes(struct.pack("<8i", 98, 99, 0, 1, 100, 101, 102, 0))
    index = struct.pack("<QBQQ", 1, 4, 5, 3) + struct.pack("<5i", 2, 1, 1, 3, 1)
    index += struct.pack("<5q", 0, 8, 12, 16, 28) + struct.pack("<3q", 0, 2, 5)
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\0\0" + index)
    assert main(["data", "inspect", str(tmp_path / "x"), "--tokenizer", "bytes"]) == 0
    printed = capsys.readouterr().out
    assert facts(printed)["documents"] == "2"
    assert facts(printed)["items"] == "5"
    assert facts(printed)["tokens"] == "8 as int32"
    assert facts(printed)["end in 0"] == "2 of 2 documents"
    assert facts(printed)["text"] == "6 bytes, 1.000 per token"
    assert "first document, 3 tokens\n    ab\n" in printed
    assert "last document, 5 tokens\n    \\x00cde\n" in printed


def test_documents_are_shown_with_beginning_and_end_and_without_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "BEGIN \x1b[31m\u202e日本" + "middle " * 3000 + "END"
    lines = "".join(f"line {i}\n" for i in range(30))
    Path("a.jsonl").write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": lines}))
    assert main(["data", "build", "a.jsonl", "--output", "x", "--tokenizer", "world"]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", "x"]) == 0
    first, last = capsys.readouterr().out.split(" document, ")[1:]
    assert "\n    BEGIN \\x1b[31m\\u202e日本middle middle" in first
    assert re.search(r"middle\n    \[\.\.\.\]\n    (.*) middle END\n", first)
    assert "\x1b" not in first and len(first) < 700
    assert "    line 0\n" in last and "    line 11\n    [...]\n    line 27\n" in last
    assert last.endswith("    line 29\n    \n")


def test_a_tokenizer_that_does_not_fit_is_named_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("über")
    assert main(["data", "build", "a.txt", "--output", "x", "--tokenizer", "world"]) == 0
    assert main(["data", "inspect", "x", "--tokenizer", "bytes"]) == 0
    printed = capsys.readouterr().out
    assert "  tokenizer    not bytes (given): it has only 257 ids\n" in printed
    assert "the only document, " in printed and "    ids " in printed


def test_bars_are_as_long_as_the_counts_and_none_is_lost() -> None:
    lengths = np.array([1] * 1000 + [2**31 - 1] + [2**31] * 25)
    rows = histogram(lengths)
    assert rows[0].split() == ["1", "1,000", "#" * 40]
    assert rows[-2].split()[-2:] == ["1", "#"]
    assert rows[-1].split()[-2:] == ["25", "#"]
    assert len(rows) == 32
    assert histogram(np.array([], np.int64)) == ["  no documents"]


def test_what_could_move_the_cursor_is_escaped() -> None:
    assert printable("a\tb\x1b\x7f\x85\u2028\u202e é日") == "a\\tb\\x1b\\x7f\\x85\\u2028\\u202e é日"


BUILD = ["build", "a.txt", "--output", "x", "--tokenizer", "bytes"]
REFUSED: dict[str, tuple[list[str], str]] = {
    "command": (["bbuild"], "unknown command 'bbuild' of rwkvtune data: did you mean build?"),
    "another command": (["xyzzy"], "there are build, inspect"),
    "flag": ([*BUILD, "--val_shar", "0.1"], "unknown flag --val_shar (did you mean --val_share?)"),
    "flag for a needed one": (["build", "a.txt", "--outptu", "x"], "did you mean --output?"),
    "no input": (["build", "--output", "x", "--tokenizer", "bytes"], "required: INPUT"),
    "no output": (["build", "a.txt", "--tokenizer", "bytes"], "--output is missing: give a prefix"),
    "no tokenizer": (["build", "a.txt", "--output", "x"], "--tokenizer is missing: give world,"),
    "share": ([*BUILD, "--val_share", "much"], "invalid float value: 'much'"),
    "share 1": ([*BUILD, "--val_share", "1"], "val_share=1.0: expected a share"),
    "ctx_len": ([*BUILD, "--ctx_len", "0"], "ctx_len=0: expected 1 or more"),
    "missing": (["build", "b.txt", *BUILD[2:]], "no such file or folder: 'b.txt'"),
    "pair": (["inspect", "nothing"], "no such file: nothing.idx"),
    "damaged pair": (["inspect", "damaged"], "damaged.idx: byte 0: found b'no index'"),
    "damaged tokenizer": (["inspect", "odd"], "odd.tokenizer.json: not a tokenizer file"),
    "tokenizer": (["inspect", "odd", "--tokenizer", "wordl"], "unknown tokenizer 'wordl'"),
    "two prefixes": (["inspect", "odd", "even"], "unrecognized arguments: even"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line_and_leaves_no_file(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("abc")
    Path("damaged.bin").write_bytes(b"xx")
    Path("damaged.idx").write_bytes(b"no index")
    with BinIdxWriter("odd", 10) as writer:
        writer.add_document([1, 0])
    Path("odd.tokenizer.json").write_text("no json")
    before = sorted(tmp_path.iterdir())
    argv, told = REFUSED[case]
    assert main(["data", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert told in printed.err
    assert sorted(tmp_path.iterdir()) == before


def test_missing_pyarrow_is_one_line_that_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    argv = [str(tmp_path / "a.parquet"), "--output", str(tmp_path / "x"), "--tokenizer", "bytes"]
    assert main(["data", "build", *argv]) == 2
    assert "install pyarrow: pip install 'rwkvtune[parquet]'" in capsys.readouterr().err


def test_help_says_what_happens_to_the_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    assert "build" in capsys.readouterr().out
    for command, words in (("build", "random.Random(N) shuffles"), ("inspect", "histogram")):
        with pytest.raises(SystemExit) as ended:
            main(["data", command, "--help"])
        assert ended.value.code == 0
        assert words in capsys.readouterr().out
    assert main(["data"]) == 2


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs terminals")
def test_on_a_terminal_a_line_tells_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 300_000)
    ours, theirs = os.openpty()
    argv: list[Any] = ["data", "build", "a.txt", "--output", "x", "--tokenizer", "bytes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-m", "rwkvtune", *argv],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux says that the other end was closed
        pass
    os.close(ours)
    assert done.returncode == 0
    assert b"tokenizing" in shown and b"MB" in shown
    assert "tokenizing" not in done.stdout
