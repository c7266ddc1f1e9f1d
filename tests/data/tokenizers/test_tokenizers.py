"""Tokenizers against closed forms and the `rwkv` package, and on the traps of the Rust library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvtune.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    as_json,
    base,
    data_tokenizer_path,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from rwkvtune.errors import UserError

MIXED = "Ünïcode, 日本語 and \U0001f600\n\r\x00\ttabs    spaces"


@pytest.fixture(scope="module")
def world() -> Tokenizer:
    return load_tokenizer("world")


@pytest.fixture(params=["bytes", "chars", "world"])
def tokenizer(request: pytest.FixtureRequest, world: Tokenizer) -> Tokenizer:
    by_name: dict[str, Tokenizer] = {
        "bytes": ByteTokenizer(),
        "chars": CharTokenizer.from_text(MIXED),
        "world": world,
    }
    return by_name[request.param]


def test_bytes_are_numbered_from_one() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("aé\x00") == [98, 0xC3 + 1, 0xA9 + 1, 1]
    assert tokenizer.decode_bytes(range(257)) == bytes(range(256))


def test_characters_are_numbered_from_one_by_code_point() -> None:
    tokenizer = CharTokenizer.from_text("hello é\n")
    assert tokenizer.characters == "\n ehloé"
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("hé\n") == [4, 7, 1]


@pytest.fixture(scope="module")
def reference() -> Any:
    """The trie tokenizer of the `rwkv` package."""
    trie = pytest.importorskip("rwkv.rwkv_tokenizer")
    return trie.TRIE_TOKENIZER(str(Path(trie.__file__).with_name("rwkv_vocab_v20230424.txt")))


def test_world_ids_are_those_of_the_rwkv_package(world: Tokenizer, reference: Any) -> None:
    ids = world.encode(MIXED)
    assert ids == reference.encode(MIXED)
    assert world.vocab_size == 65536
    every_id = range(1, 65530)
    assert world.decode_bytes(every_id) == b"".join(reference.idx2token[i] for i in every_id)


def test_text_comes_back_exactly(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(MIXED)
    assert tokenizer.decode(ids) == MIXED
    assert 0 < min(ids) <= max(ids) < tokenizer.vocab_size
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_bytes_and_world(text: str, world: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), world):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_joined_by_the_byte_0_keep_their_world_ids(world: Tokenizer, reference: Any) -> None:
    holding = [id for id, token in reference.idx2token.items() if b"\0" in token]
    assert [reference.idx2token[id] for id in holding] == [b"\0"]
    texts = ["a", "", "\0", "b\0", "\0c", "\0\0", "de" * 20_000, " ", "f " * 9_000, "\n\n", "\n"]
    expected = [id for text in texts for id in [*reference.encode(text), 0]]
    assert world.encode_documents(texts).ids.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6), unfinished=st.booleans())
def test_many_texts_at_once_give_the_ids_of_each(
    texts: list[str], unfinished: bool, world: Tokenizer
) -> None:
    chars = CharTokenizer.from_text("".join(texts) + "x")
    numbered = {character: 1 + i for i, character in enumerate(sorted({*"".join(texts), "x"}))}
    by_hand: list[tuple[Tokenizer, list[list[int]]]] = [
        (ByteTokenizer(), [[1 + byte for byte in text.encode()] for text in texts]),
        (chars, [[numbered[character] for character in text] for text in texts]),
        (world, [world.encode(text) for text in texts]),
    ]
    for tokenizer, wanted in by_hand:
        encoded = tokenizer.encode_documents(texts, unfinished=unfinished)
        expected = [id for ids in wanted for id in [*ids, 0]]
        assert encoded.ids.tolist() == (expected[:-1] if unfinished else expected)
        assert encoded.sizes.sum() == len(encoded.ids)
        assert encoded.sizes[:-1].tolist() == [1 + len(ids) for ids in wanted[:-1]]
        assert encoded.text_bytes.tolist() == [len(text.encode()) for text in texts]


@pytest.mark.parametrize(
    "part", ["Ünï cöde 日本語。\n \U0001f600 12 3\t", "ACGTTGCA", "日本語", " " * 9]
)
def test_a_text_cut_where_the_tokenizer_says_gives_the_ids_of_the_whole(
    part: str, world: Tokenizer, reference: Any
) -> None:
    encoded = (part * 300).encode()
    for length in range(1000, 1020):
        cut = world.last_cut(encoded[:length])
        assert length - 256 < cut <= length
        whole = reference.encode(encoded.decode())
        assert world.encode(encoded[:cut].decode()) + world.encode(encoded[cut:].decode()) == whole
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_text(part)):
        assert length - 4 <= tokenizer.last_cut(encoded[:length]) <= length
    assert world.last_cut(b"") == world.last_cut(b"a") == world.last_cut("日".encode()) == 0


def test_a_long_text_is_encoded_in_pieces_with_the_ids_of_the_whole(
    world: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("ACGT" * 2000, "one two\nthree 日本" * 400):
        whole = world.encode(text)
        monkeypatch.setattr(base, "PIECE_BYTES", 1000)
        assert world.encode(text) == whole
        monkeypatch.undo()
    chars = CharTokenizer.from_text("a b")
    monkeypatch.setattr(base, "PIECE_BYTES", 1000)
    with pytest.raises(UserError, match="character 'z' at position 1800 is"):
        chars.encode("a b" * 600 + "z")


def test_every_wrong_id_is_noticed(world: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library had a mistake: one id is another, alike in length and beginning or not."""
    from pyrwkv_tokenizer import RWKVTokenizer

    def refused(text: str, wrong: list[int]) -> None:
        monkeypatch.setattr(RWKVTokenizer, "encode", lambda self, text: wrong)
        with pytest.raises(UserError, match="does not give this text back"):
            world.encode(text)

    text = "The quick brown fox; " + "=" * 64 + " misunderstanding\n" + "日本語" * 5
    right = world.encode(text)
    table = {id: world.decode_bytes([id]) for id in range(1, 65530)}
    for position, id in enumerate(right):
        same_length = next(i for i, t in table.items() if len(t) == len(table[id]) and i != id)
        for other in (same_length, 65535):
            refused(text, [*right[:position], other, *right[position + 1 :]])

    seen: dict[tuple[int, bytes], int] = {}
    alike = [
        (token.decode(), other)
        for id, token in table.items()
        if len(token) > 8 and (other := seen.setdefault((len(token), token[:8]), id)) != id
        if token.isascii()
    ]
    assert len(alike) > 20
    for text, other in alike[:20]:
        refused(text, [other])


def test_bytes_that_move_from_one_text_to_the_next_are_noticed(
    world: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyrwkv_tokenizer import RWKVTokenizer

    ids = {"ab": world.encode("a"), "c": world.encode("bc")}
    ids["ab\0c\0"] = [*ids["ab"], 1, *ids["c"], 1]
    monkeypatch.setattr(RWKVTokenizer, "encode", lambda self, text: ids[text])
    with pytest.raises(UserError, match="does not give this text back"):
        world.encode_documents(["ab", "c"])


def test_end_of_document_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("an")
    assert tokenizer.decode([0, *ids, 0, *ids]) == "anan"


def test_a_character_cut_by_a_token_border_is_whole_again_in_the_bytes(world: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), world):
        ids = [tokenizer.encode("\x00")[0] + byte for byte in "語".encode()]
        assert tokenizer.decode(ids[:2]) == "\ufffd"
        assert b"".join(tokenizer.decode_bytes([id]) for id in ids).decode() == "語"


def test_world_ids_without_a_token_decode_to_a_visible_mark(world: Tokenizer) -> None:
    assert world.decode([65530, *world.encode("a"), 65535]) == "\ufffda\ufffd"
    assert list(world.unused_ids) == [*range(65530, 65536)]


@pytest.mark.parametrize("bad", [-1, 65536, 10**12])
def test_ids_beyond_the_vocabulary_are_named_with_their_place(
    tokenizer: Tokenizer, bad: int
) -> None:
    with pytest.raises(
        UserError, match=rf"cannot decode id {bad} at position 1: the {tokenizer.name} "
    ):
        tokenizer.decode([1, bad, 1])


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_half_a_surrogate_pair_is_refused_with_its_place(name: str) -> None:
    with pytest.raises(UserError, match=r"character 2 of the text is '\\ud800'"):
        load_tokenizer(name).encode("ab\ud800")


def test_an_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(
        UserError, match="character 'z' at position 3 is not among the 3 characters"
    ):
        CharTokenizer.from_text("abc").encode("abcz")


class PanicException(BaseException):
    """Named like what pyo3 raises when Rust panics; the real one cannot be made from Python."""


def test_a_panic_of_the_rust_library_is_an_ordinary_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyrwkv_tokenizer import RWKVTokenizer

    def panic(self: object, text: str) -> list[int]:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(RWKVTokenizer, "encode", panic)
    with pytest.raises(UserError, match="index out of bounds"):
        load_tokenizer("world").encode("a")
    monkeypatch.setattr(RWKVTokenizer, "encode", lambda self, text: [1])
    with pytest.raises(
        UserError, match=r"does not give this text back \(2 bytes, beginning 'ab'\)"
    ):
        load_tokenizer("world").encode("ab")


def test_byte_lengths_are_those_of_each_decoded_id(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert [
        len(tokenizer.decode_bytes([id])) for id in range(tokenizer.vocab_size)
    ] == lengths.tolist()


def test_a_run_folder_keeps_its_tokenizer(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    assert find_tokenizer(run_dir) is None
    save_tokenizer(tokenizer, run_dir)
    (run_dir / "rwkv-1.pth").touch()
    for where in (run_dir, run_dir / "rwkv-1.pth"):
        found = find_tokenizer(where)
        assert found is not None
        assert found.to_json() == tokenizer.to_json()
        assert found.encode(MIXED) == tokenizer.encode(MIXED)
    assert load_tokenizer(run_dir / "tokenizer.json").name == tokenizer.name
    (run_dir / "another_run").mkdir()
    assert find_tokenizer(run_dir / "another_run") is None
    monkeypatch.chdir(run_dir)
    assert find_tokenizer(".") is not None


def test_token_files_keep_their_tokenizer(tmp_path: Path) -> None:
    data_tokenizer_path(tmp_path / "v1.2").write_bytes(as_json(ByteTokenizer()))
    for name in ("v1.2", "v1.2.bin", "v1.2.idx"):
        found = find_tokenizer(tmp_path / name)
        assert found is not None
        assert found.name == "bytes"
    assert find_tokenizer(tmp_path / "v1.3") is None


def test_a_saved_vocabulary_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text(MIXED)
    tokenizer.save(tmp_path / "vocabulary.json")
    content = json.loads((tmp_path / "vocabulary.json").read_text(encoding="utf-8"))
    assert content == {"kind": "chars", "characters": "".join(sorted(set(MIXED)))}
    assert load_tokenizer(str(tmp_path / "vocabulary.json")).encode(MIXED) == tokenizer.encode(
        MIXED
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer file"),
        (b"\xff\xfe", "not a tokenizer file"),
        (b"[1]", "no tokenizer of ours"),
        (b'{"kind": "words"}', "no tokenizer of ours"),
        (b'{"kind": "chars"}', "no tokenizer of ours"),
        (b'{"kind": "chars", "characters": ""}', "at least one character and each once"),
        (b'{"kind": "chars", "characters": "aba"}', "got 3 characters, 2 of them different"),
    ],
)
def test_a_damaged_tokenizer_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        find_tokenizer(tmp_path)
    assert "tokenizer.json" in str(error.value)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match="unknown tokenizer 'wordl': expected bytes, world"):
        load_tokenizer("wordl")
    with pytest.raises(UserError, match="'chars' alone does not say which characters"):
        load_tokenizer("chars")


def test_tokenizers_work_where_torch_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from rwkvtune.data.tokenizers import load_tokenizer\n"
        "assert load_tokenizer('world').encode('ab')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
