"""Qwen's tokenizer of a checkpoint, and a tiny one of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2Tokenizer

from rwkvtune.errors import UserError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder, from local files; UserError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} has no tokenizer that can be read: {reason}") from error


def byte_tokenizer(model_max_length: int = 4096) -> Any:
    """Qwen2's tokenizer with its 256 bytes as the whole vocabulary, and its special tokens."""
    # The printable stand-ins of byte-level BPE (GPT-2's table).
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = dict(zip(plain, map(chr, plain), strict=True))
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return Qwen2Tokenizer(
        vocab={letters[byte]: byte for byte in range(256)},
        merges=[],
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=model_max_length,
    )
