"""Tokenizer files that transformers loads by itself, for vocabularies in which the longest token
that fits is taken.

`tokenizer.json` says so to the tokenizers library with its own parts: bytes become one character
each (ByteLevel), one regular expression that is the tree of all tokens cuts the text (Split), and a
table gives the ids (WordLevel). Text is cut in time proportional to its length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
"""What released folders call token 0."""
WORLD_VOCABULARY = "rwkv_vocab_v20230424.txt"
"""Under this name llama.cpp's converter and other programs look for it."""
OWN_TOKENIZER = "rwkvtune_tokenizer.json"
"""Where a folder keeps another tokenizer than World for the way back."""

_LONGEST_MATCH = ("world", "bytes", "chars", "vocab")


def tokenizer_files(tokenizer: Tokenizer, chat_template: str | None = None) -> dict[str, str]:
    """Content of tokenizer.json and tokenizer_config.json; empty for a tokenizer that is no such
    vocabulary.

    chat_template: in Jinja.
    """
    if tokenizer.name not in _LONGEST_MATCH:
        return {}
    characters = byte_characters()
    unused = {END_OF_DOCUMENT, *tokenizer.unused_ids}
    vocabulary = {
        "".join(characters[byte] for byte in tokenizer.decode_bytes([id])): id
        for id in range(tokenizer.vocab_size)
        if id not in unused
    }
    end = {"id": END_OF_DOCUMENT, "content": END_OF_TEXT, "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
                {
                    "type": "Split",
                    "pattern": {"Regex": longest_match_pattern(vocabulary)},
                    "behavior": "Isolated",
                    "invert": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        # No such token: what has no id is an error, not a text without it.
        "model": {
            "type": "WordLevel",
            "vocab": {END_OF_TEXT: END_OF_DOCUMENT} | vocabulary,
            "unk_token": "<no token>",
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' word for no limit
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def byte_characters() -> list[str]:
    """The character that stands for each byte in the tokenizers library, as in GPT-2: itself where
    it is printable Latin-1, else the next from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def longest_match_pattern(words: Iterable[str]) -> str:
    """A regular expression that matches, at a place, the longest of the words that fits there."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}  # a word ends here
    return _pattern_of(tree)


def _pattern_of(node: dict[str, Any]) -> str:
    leaves = [_escaped(c) for c, below in node.items() if c and below.keys() == {""}]
    branches = [
        _escaped(c) + _pattern_of(below) for c, below in node.items() if c and below.keys() != {""}
    ]
    if leaves:
        branches.append(f"[{''.join(leaves)}]" if len(leaves) > 1 else leaves[0])
    if not branches:
        return ""
    together = f"(?:{'|'.join(branches)})" if len(branches) > 1 or "" in node else branches[0]
    return together + "?" * ("" in node)  # longer words are tried first


def _escaped(character: str) -> str:
    return f"\\{character}" if character in r"\^$.|?*+()[]{}-&~#" else character
