"""Vocabulary files, against the trie tokenizer of the `rwkv` package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvtune.data.tokenizers import as_json, find_tokenizer, load_tokenizer
from rwkvtune.data.tokenizers.vocabulary import (
    VocabularyTokenizer,
    parse_vocabulary,
    read_vocabulary,
    vocabulary_lines,
)
from rwkvtune.errors import MissingFileError, UserError

ALL_BYTES = {1 + byte: bytes([byte]) for byte in range(256)}

# Greedy: "abcd" is not found where "ab" and "cd" were; some words are longer than 8 and 16 bytes.
WORDS = [
    "ab",
    "abc",
    "bcd",
    " a",
    "  ",
    "über",
    "日本",
    "本語",
    "日",
    "aaaaaaaa",
    "aaaaaaaaa",
    "b" * 40,
]


@pytest.fixture
def vocabulary_file(tmp_path: Path) -> Path:
    tokens = ALL_BYTES | {1000 + 3 * i: word.encode() for i, word in enumerate(WORDS)}
    path = tmp_path / "vocabulary.txt"
    path.write_text("\n".join(vocabulary_lines(tokens)) + "\n", encoding="utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.one_of(
            st.text(max_size=30),
            st.lists(st.sampled_from([*WORDS, "a", "b", "c", " "]), max_size=20).map("".join),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_ids_are_those_of_the_trie(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    trie = pytest.importorskip("rwkv.rwkv_tokenizer")
    path = tmp_path_factory.getbasetemp() / "trie_vocabulary.txt"
    tokens = ALL_BYTES | {1000 + 3 * i: word.encode() for i, word in enumerate(WORDS)}
    path.write_text("\n".join(vocabulary_lines(tokens)), encoding="utf-8")
    reference, tokenizer = trie.TRIE_TOKENIZER(str(path)), load_tokenizer(path)
    wanted = [reference.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == wanted
    assert tokenizer.encode_documents(texts).ids.tolist() == [i for w in wanted for i in [*w, 0]]


def test_ids_above_16_bits_are_given_too(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("70000 'a' 1\n3 'b' 1\n65536 'ab' 2\n")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("aabb") == [70000, 65536, 3]
    assert tokenizer.vocab_size == 70001
    assert tokenizer.decode([65536, 0, 70000]) == "aba"


def test_comments_blank_lines_line_ends_and_all_kinds_of_literals_are_understood(
    tmp_path: Path,
) -> None:
    (tmp_path / "v").write_bytes(
        "\ufeff# made by hand\r\n\r\n0 '' 0\r\n"
        "1 'a' 1 # trailing\r\n 2   \"it's # 1\"   8 \r\n3 b'\\xe6\\x97' 2\n"
        "4 '\\u65e5\\n' 4\n5 'ü' 2\n6 '\\x85\\t' 3\n7 '\u2028' 3\n8 ' ' 1\n9 r'\\n' 2".encode()
    )
    tokens = read_vocabulary(tmp_path / "v")
    assert tokens == {
        1: b"a",
        2: b"it's # 1",
        3: b"\xe6\x97",
        4: "日\n".encode(),
        5: "ü".encode(),
        6: "\x85\t".encode(),
        7: "\u2028".encode(),
        8: b" ",
        9: b"\\n",
    }
    assert parse_vocabulary(vocabulary_lines(tokens), "again") == tokens


REFUSED = {
    "1 'a' 1\n1 'b' 1": "line 2: id 1 was given in line 1 already",
    "1 'a' 1\n\n2 b'a' 1": "line 3: the token b'a' was given in line 1 already, with another id",
    "1 'é' 1": "line 1: \"1 'é' 1\": the token has 2 bytes in UTF-8, but the line says 1",
    "0 'a' 1": "line 1: id 0 ends a document and cannot stand for text",
    "# c\n5 '' 0": "line 2: the token of id 5 is empty",
    "1 a 1": "line 1: expected `<id> <Python string> <length in bytes>`",
    "1 'a'": "line 1: expected `<id>",
    "-1 'a' 1": "line 1: expected `<id>",
    "1 'a' 1 2": "line 1: expected `<id>",
    "1 __import__('os').getcwd() 1": "line 1: expected `<id>",
    "1 f'{1}' 1": "line 1: f'{1}' is no Python string",
    "1 '\\ud800' 3": "line 1: '\\ud800' is no Python string of Unicode text or bytes",
    "1 b'é' 2": "line 1: b'é' is no Python string",
    "99999999 'a' 1": "line 1: id 99999999 is too large",
    "# nothing": "holds no tokens",
    "": "holds no tokens",
}


@pytest.mark.parametrize("content", REFUSED)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "v.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "v.txt")
    assert str(caught.value).startswith(f"{tmp_path / 'v.txt'}: {REFUSED[content]}")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_bytes(b"\xff\xfe1")
    with pytest.raises(UserError, match=r"v\.txt: byte 0 is not UTF-8"):
        load_tokenizer(tmp_path / "v.txt")
    with pytest.raises(MissingFileError, match="unknown tokenizer"):
        load_tokenizer(tmp_path)


def test_a_byte_that_no_token_fits_is_named_with_its_place() -> None:
    tokenizer = VocabularyTokenizer({1: b"a", 2: b"ab", 3: "日".encode()[:2]})
    for text, place in (("aba日", r"byte 5 .*\(0xa5"), ("b", r"byte 0 .*\(0x62"), ("a\0", "0x00")):
        with pytest.raises(UserError, match=place):
            tokenizer.encode(text)
    with pytest.raises(UserError, match="no token of the vocabulary fits at byte 1 of the text"):
        tokenizer.encode_documents(["a", "ac", "b"])


def test_it_is_kept_beside_data_and_found_again(vocabulary_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(vocabulary_file)
    (tmp_path / "x.tokenizer.json").write_bytes(as_json(tokenizer))
    found = find_tokenizer(tmp_path / "x")
    assert found is not None
    assert (found.name, found.vocab_size) == ("vocab", tokenizer.vocab_size)
    assert found.encode("über 日本語\0") == tokenizer.encode("über 日本語\0")
    assert list(found.unused_ids)[:2] == [257, 258] and 1000 not in found.unused_ids
    assert found.decode([257]) == "\ufffd"
    content = json.loads((tmp_path / "x.tokenizer.json").read_text(encoding="utf-8"))
    content["lines"][3] = "4 'xy' 1"
    (tmp_path / "x.tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"x\.tokenizer\.json: line 4: .* has 2 bytes"):
        find_tokenizer(tmp_path / "x")


def test_the_world_vocabulary_is_recognised_with_either_kind_of_line_ends(tmp_path: Path) -> None:
    pyrwkv = pytest.importorskip("pyrwkv_tokenizer")
    content = (Path(pyrwkv.__file__).parent / "rwkv_vocab_v20230424.txt").read_bytes()
    (tmp_path / "v.txt").write_bytes(content.replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path / "v.txt").name == "world"
    (tmp_path / "v.txt").write_bytes(content[content.index(b"\n") + 1 :])
    assert load_tokenizer(tmp_path / "v.txt").vocab_size == 65530
