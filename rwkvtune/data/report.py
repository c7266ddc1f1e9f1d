"""What `rwkvtune data` prints about token files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

import numpy as np

from rwkvtune.data.binidx import BinIdx
from rwkvtune.data.build import Built, TokenFiles
from rwkvtune.data.sampler import magic_prime
from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer, find_tokenizer
from rwkvtune.errors import UserError

_BLOCK = 1 << 22  # tokens looked at together
_BAR = 40  # characters of the longest bar
_HEAD, _TAIL = 300, 150  # characters shown of a document that is longer
_HEAD_LINES, _TAIL_LINES = 12, 4
_SHOWN_IDS = 32


def about_built(built: Built, ctx_len: int) -> list[str]:
    """Lines about what was written, ending with the command that trains on it."""
    lines = [f"note: {note}" for note in built.notes]
    for files in [built.train, *([built.validation] if built.validation else [])]:
        lines += ["", f"{files.prefix}.bin and .idx", *_aligned(_numbers(files, ctx_len))]
    prime = _magic_prime(built.train.tokens, ctx_len)
    flags = ["--data_file", built.train.prefix]
    if built.validation:
        flags += ["--val_data_file", built.validation.prefix]
    flags += ["--ctx_len", str(ctx_len)]
    if prime:
        flags += ["--magic_prime", str(prime), "--exit_tokens", str(built.train.tokens)]
        lines += ["", "One pass over it:", f"  rwkvtune train {shlex.join(flags)}"]
    return lines[1:] if lines[0] == "" else lines


def _numbers(files: TokenFiles, ctx_len: int) -> list[tuple[str, str]]:
    return [
        ("documents", f"{files.documents:,}"),
        ("tokens", f"{files.tokens:,}, one at the end of each document included"),
        ("text", f"{files.text_bytes:,} bytes"),
        ("bytes per token", f"{files.bytes_per_token:.3f}"),
        ("longest document", f"{files.longest:,} tokens"),
        ("magic prime", _about_prime(files.tokens, ctx_len)),
    ]


def about_token_files(prefix: str, tokenizer: Tokenizer | None, ctx_len: int) -> list[str]:
    """Lines about a pair of token files: counts, lengths of documents, first and last document.

    tokenizer: None takes the one that is kept beside the files.
    """
    data = BinIdx(prefix)
    if data.dtype.itemsize == 4:
        data.check_ids(2**31)  # none below zero
    where = "given" if tokenizer else "kept beside the files"
    tokenizer = tokenizer or find_tokenizer(data.prefix)
    largest = max(int(block.max()) for block in _blocks(data))
    token_ends = np.append(0, np.cumsum(data.sizes, dtype=np.int64))
    begins, ends = token_ends[data.doc_index[:-1]], token_ends[data.doc_index[1:]]
    filled = ends > begins
    num_ended = int((data.tokens[ends[filled] - 1] == END_OF_DOCUMENT).sum())
    facts = [
        ("documents", f"{len(begins):,}"),
        ("items", f"{len(data.sizes):,}"),
        ("tokens", f"{len(data):,} as {data.dtype.name}"),
        ("largest id", f"{largest:,}"),
        ("end in 0", f"{num_ended:,} of {len(begins):,} documents"),
        ("magic prime", _about_prime(len(data), ctx_len)),
    ]
    if tokenizer is None:
        facts.append(("tokenizer", "none kept beside the files, and none given by --tokenizer"))
    elif largest >= tokenizer.vocab_size:
        facts.append(
            (
                "tokenizer",
                f"not {tokenizer.name} ({where}): it has only {tokenizer.vocab_size:,} ids",
            )
        )
        tokenizer = None
    else:
        lengths = tokenizer.token_byte_lengths()
        text_bytes = sum(int(lengths.take(block).sum()) for block in _blocks(data))
        num_ends = sum(int((block == END_OF_DOCUMENT).sum()) for block in _blocks(data))
        per_token = text_bytes / max(len(data) - num_ends, 1)
        facts.append(("tokenizer", f"{tokenizer.name} with {tokenizer.vocab_size:,} ids, {where}"))
        facts.append(("text", f"{text_bytes:,} bytes, {per_token:.3f} per token"))
    size = data.bin_path.stat().st_size
    lines = [f"{data.bin_path}: {size:,} bytes, with {data.idx_path.name}", *_aligned(facts)]
    lines += ["", "tokens per document", *histogram(ends - begins)]
    names = ["the only document"] if len(begins) == 1 else ["first document", "last document"]
    for name, i in zip(names, (0, -1), strict=False) if len(begins) else ():
        ids = data.tokens[begins[i] : ends[i]]
        lines += ["", f"{name}, {len(ids):,} tokens", *_shown(ids, tokenizer)]
    return lines


def histogram(lengths: np.ndarray) -> list[str]:
    """How many documents there are of 0, 1, 2-3, 4-7, 8-15 ... tokens, with bars."""
    if not len(lengths):
        return ["  no documents"]
    exponents = np.frexp(lengths.astype(np.float64))[1]  # 0: none; k: 2^(k-1) to 2^k - 1
    counts = np.bincount(exponents)
    rows = []
    for k in range(int(exponents.min()), len(counts)):
        low, high = (1 << k) >> 1, (1 << k) - 1
        label = f"{low:,}" if low == high else f"{low:,} - {high:,}"
        bar = "#" * int(np.ceil(_BAR * counts[k] / counts.max()))
        rows.append((label, f"{counts[k]:,}", bar))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [
        f"  {label:>{widths[0]}}  {count:>{widths[1]}}  {bar}".rstrip()
        for label, count, bar in rows
    ]


def printable(text: str) -> str:
    """The text with control characters, which could move the cursor or worse, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(ids: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    """The beginning and the end of a document, short enough to be read."""
    if len(ids) and ids[-1] == END_OF_DOCUMENT:
        ids = ids[:-1]
    if not len(ids):
        return ["    (no text)"]
    if tokenizer is None:
        more = f" ... ({len(ids):,} in all)" if len(ids) > _SHOWN_IDS else ""
        return [f"    ids {' '.join(map(str, ids[:_SHOWN_IDS].tolist()))}{more}"]
    # A character has at most four bytes, and a token at least one: enough for what is shown.
    head, tail = 4 * _HEAD, 4 * _TAIL
    if len(ids) <= head + tail:
        first = last = tokenizer.decode(ids.tolist())
        if len(first) <= _HEAD + _TAIL and first.count("\n") < _HEAD_LINES + _TAIL_LINES:
            return _lines(first)
    else:
        first, last = tokenizer.decode(ids[:head].tolist()), tokenizer.decode(ids[-tail:].tolist())
    return [
        *_lines(first[:_HEAD])[:_HEAD_LINES],
        "    [...]",
        *_lines(last[-_TAIL:])[-_TAIL_LINES:],
    ]


def _lines(text: str) -> list[str]:
    return [f"    {printable(line)}" for line in text.split("\n")]


def _blocks(data: BinIdx) -> Iterable[np.ndarray]:
    return (data.tokens[i : i + _BLOCK] for i in range(0, len(data), _BLOCK))


def _magic_prime(tokens: int, ctx_len: int) -> int | None:
    try:
        return magic_prime(tokens, ctx_len)
    except UserError:
        return None


def _about_prime(tokens: int, ctx_len: int) -> str:
    prime = _magic_prime(tokens, ctx_len)
    if prime:
        return f"{prime} for ctx_len {ctx_len}"
    return (
        f"none: ctx_len {ctx_len} needs at least {3 * ctx_len:,} tokens; take a smaller one, or "
        "train with --order shuffled"
    )


def _aligned(facts: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in facts)
    return [f"  {name:<{width}}  {value}" for name, value in facts]
