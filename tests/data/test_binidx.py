"""Token files against bytes that RWKV-LM's make_data wrote, and against damage of every part."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rwkvtune.data.binidx import BinIdx, BinIdxWriter, TokenSpool
from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write_together

CASES = ["case_small_vocab", "case_single_epoch_small_vocab", "case_world_vocab"]


@pytest.fixture(scope="module")
def make_data(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "make_data.json").read_text())
    return content


@pytest.fixture
def upstream_pair(make_data: dict[str, Any], tmp_path: Path) -> Path:
    case = make_data["case_single_epoch_small_vocab"]
    (tmp_path / "x.bin").write_bytes(base64.b64decode(case["bin_base64"]))
    (tmp_path / "x.idx").write_bytes(base64.b64decode(case["idx_base64"]))
    return tmp_path / "x"


def write(prefix: Path, documents: list[Any], vocab_size: int) -> None:
    with BinIdxWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.mark.parametrize("name", CASES)
def test_writer_gives_the_bytes_of_make_data(
    make_data: dict[str, Any], tmp_path: Path, name: str
) -> None:
    case = make_data[name]
    cuts = np.cumsum(case["sizes"])[:-1]
    write(tmp_path / "deeper" / "x", np.split(np.array(case["tokens"]), cuts), 65536)
    bin_bytes = (tmp_path / "deeper" / "x.bin").read_bytes()
    idx_bytes = (tmp_path / "deeper" / "x.idx").read_bytes()
    assert bin_bytes == base64.b64decode(case["bin_base64"])
    assert idx_bytes == base64.b64decode(case["idx_base64"])
    assert hashlib.sha256(idx_bytes).hexdigest() == case["idx_sha256"]
    assert sorted(path.name for path in (tmp_path / "deeper").iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("name", CASES)
def test_reader_gives_the_tokens_and_documents_of_make_data(
    make_data: dict[str, Any], tmp_path: Path, name: str
) -> None:
    case = make_data[name]
    (tmp_path / "x.bin").write_bytes(base64.b64decode(case["bin_base64"]))
    (tmp_path / "x.idx").write_bytes(base64.b64decode(case["idx_base64"]))
    data = BinIdx(tmp_path / "x", vocab_size=max(case["tokens"]) + 1)
    assert data.tokens.tolist() == case["tokens"]
    assert data.sizes.tolist() == case["sizes"]
    assert data.doc_index.tolist() == case["doc_idx"]
    assert len(data) == case["num_tokens"]
    assert data.dtype == np.uint16
    assert not data.tokens.flags.writeable


def test_a_pair_is_found_by_the_name_of_either_file(upstream_pair: Path) -> None:
    for suffix in ("", ".bin", ".idx"):
        assert len(BinIdx(f"{upstream_pair}{suffix}")) == 354
    for suffix in (
        ".bin",
        ".idx",
    ):  # a prefix may itself end like this: names are plain concatenation
        Path(f"{upstream_pair}{suffix}").rename(f"{upstream_pair}.bin{suffix}")
    assert len(BinIdx(f"{upstream_pair}.bin")) == 354


def test_ids_above_16_bits_are_stored_as_int32_with_code_4(tmp_path: Path) -> None:
    write(tmp_path / "x", [[65536, 0], [1, 2, 3]], vocab_size=65537)
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<5i", 65536, 0, 1, 2, 3)
    index = struct.pack("<QBQQ", 1, 4, 2, 3) + struct.pack("<2i2q3q", 2, 3, 0, 8, 0, 1, 2)
    assert (tmp_path / "x.idx").read_bytes() == b"MMIDIDX\0\0" + index
    assert BinIdx(tmp_path / "x", vocab_size=65537).tokens.tolist() == [65536, 0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(
        hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, 69999)),
        min_size=1,
        max_size=8,
    ).filter(lambda documents: sum(map(len, documents)) > 0)
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]
) -> None:
    prefix = tmp_path_factory.mktemp("pair") / "x"
    write(prefix, documents, 70000)
    data = BinIdx(prefix, vocab_size=70000)
    assert data.tokens.tolist() == np.concatenate(documents).tolist()
    assert data.sizes.tolist() == [len(document) for document in documents]


@pytest.mark.parametrize(
    ("offset", "new_bytes", "message"),
    [
        (0, b"NOTANIDX", r"x\.idx: byte 0: found b'NOTANIDX.*expected b'MMIDIDX"),
        (9, b"\x02", r"x\.idx: byte 9: version 2, expected 1"),
        (17, b"\x06", r"x\.idx: byte 17: dtype code 6, expected 8 \(uint16\) or 4 \(int32\)"),
        (18, b"\x15", r"x\.idx: ends at byte 442, expected 454 for the 21 items \(byte 18\)"),
        (
            26,
            b"\xff" * 8,
            r"x\.idx: ends at byte 442, expected \d+ .* document-index entries \(byte 26\)",
        ),
        (38, b"\xff" * 4, r"x\.idx: byte 38: size of item 1 is -1, expected 0 or more"),
        (38, b"\x20", r"x\.idx: byte 130: pointer of item 2 is 80, expected 82"),
        (34 + 80 + 8, b"\x13", r"x\.idx: byte 122: pointer of item 1 is 19, expected 18"),
        (
            34 + 240 + 8,
            b"\x63",
            r"x\.idx: byte 282: document-index entry 1 is 99, expected rising from 0 to 20",
        ),
        (17, b"\x04", r"pointer of item 1 is 18, expected 36"),
        (
            34 + 76,
            b"\x12",
            r"x\.bin: ends at byte 708, but x\.idx describes 710 bytes \(355 tokens",
        ),
    ],
)
def test_damage_in_the_index_is_named_with_file_offset_and_value(
    upstream_pair: Path, offset: int, new_bytes: bytes, message: str
) -> None:
    path = Path(f"{upstream_pair}.idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(new_bytes)] = new_bytes
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        BinIdx(upstream_pair)


@pytest.mark.parametrize("length", [*range(0, 36), 100, 441])
def test_an_index_cut_short_anywhere_is_refused(upstream_pair: Path, length: int) -> None:
    path = Path(f"{upstream_pair}.idx")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=rf"x\.idx: ends at byte {length}\b"):
        BinIdx(upstream_pair)


@pytest.mark.parametrize("length", [0, 1, 707, 709])
def test_a_bin_of_the_wrong_length_is_refused(upstream_pair: Path, length: int) -> None:
    path = Path(f"{upstream_pair}.bin")
    path.write_bytes((path.read_bytes() + b"\0")[:length])
    with pytest.raises(
        UserError, match=rf"x\.bin: ends at byte {length}, but x\.idx describes 708 bytes"
    ):
        BinIdx(upstream_pair)


def test_a_pair_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 0, 1) + bytes(8))
    with pytest.raises(UserError, match=r"x\.bin: holds 0 tokens"):
        BinIdx(tmp_path / "x")


def test_a_missing_file_names_the_pairs_that_are_there(upstream_pair: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no such file: .*y\.idx\. Pairs of token files in .*: x\. "
    ):
        BinIdx(upstream_pair.with_name("y"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        BinIdx(upstream_pair.parent / "nowhere" / "x")
    Path(f"{upstream_pair}.bin").unlink()
    with pytest.raises(UserError, match=r"no such file: .*x\.bin"):
        BinIdx(upstream_pair)


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    write(tmp_path / "x", [[5, 6, 7], [300, 400, 0]], vocab_size=65536)
    with pytest.raises(
        UserError, match=r"x\.bin: byte 6 \(token 3\): id 300 is not .* of 300 ids.*is 400"
    ):
        BinIdx(tmp_path / "x", vocab_size=300)
    BinIdx(tmp_path / "x", vocab_size=401)
    (tmp_path / "y.bin").write_bytes(struct.pack("<2i", 3, -1))
    (tmp_path / "y.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 1, 2) + struct.pack("<i3q", 2, 0, 0, 1)
    )
    with pytest.raises(UserError, match=r"y\.bin: byte 4 \(token 1\): id -1"):
        BinIdx(tmp_path / "y", vocab_size=70000)


@pytest.mark.parametrize("bad", [-1, 10, 65536])
def test_the_writer_refuses_ids_beyond_the_vocabulary_and_leaves_nothing(
    tmp_path: Path, bad: int
) -> None:
    with (
        pytest.raises(
            UserError, match=rf"document 1, token 2: id {bad} is not in the vocabulary of 10"
        ),
        BinIdxWriter(tmp_path / "x", 10) as writer,
    ):
        writer.add_document([1, 2])
        writer.add_document([3, 4, bad])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_pair(upstream_pair: Path) -> None:
    with pytest.raises(KeyError), BinIdxWriter(upstream_pair, 10) as writer:
        writer.add_document([1])
        raise KeyError
    assert len(BinIdx(upstream_pair)) == 354
    write(upstream_pair, [[1]], 10)
    assert len(BinIdx(upstream_pair)) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_disk_that_fills_up_leaves_the_old_pair(
    upstream_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object, **kwargs: object) -> BinaryIO:
        return open("/dev/full", "wb+")

    monkeypatch.setattr(tempfile, "TemporaryFile", full_disk)
    for document in ([1], [1] * 100_000):  # found out at the end, and on the way
        with pytest.raises(UserError, match=r"cannot write .*x\.bin: No space left"):
            write(upstream_pair, [document], 10)
    assert len(BinIdx(upstream_pair)) == 354
    assert sorted(path.name for path in upstream_pair.parent.iterdir()) == ["x.bin", "x.idx"]


def test_documents_are_written_in_any_order_and_number(tmp_path: Path) -> None:
    documents = [[1, 2], [], [3], [4, 5, 6], [7]]
    order = [np.array([4, 0, 1, 2]), np.array([3]), np.array([3, 3, 4])]
    with TokenSpool(tmp_path / "x", 70000) as spool:
        spool.add_documents(np.array(sum(documents[:3], []), np.int64), [2, 0, 1])
        spool.add_documents(np.array([4, 5, 6, 7]), np.array([3, 1]))
        atomic_write_together(spool.pair(str(tmp_path / "x"), order))
    data = BinIdx(tmp_path / "x")
    assert data.tokens.tolist() == [7, 1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5, 6, 7]
    assert data.sizes.tolist() == [1, 2, 0, 1, 3, 3, 3, 1]


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokens to write"):
        write(tmp_path / "x", [[], []], 10)
    assert list(tmp_path.iterdir()) == []
