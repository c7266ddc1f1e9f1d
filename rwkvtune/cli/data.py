"""`rwkvtune data`: token files from text (build), and a look into them (inspect)."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rwkvtune.cli import output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.errors import UserError

if TYPE_CHECKING:
    from rwkvtune.data.build import Progress

BUILD_HELP = """Turn text into the token files that RWKV programs read (PREFIX.bin, .idx), and keep
the tokenizer beside them as PREFIX.tokenizer.json.

  rwkvtune data build my.txt --output data/my --tokenizer world --val_share 0.1
  rwkvtune data build books 'more/**/*.jsonl.zst' --output data/all --tokenizer world --seed 1

An INPUT is a file, a folder with all folders below it, or a glob in quotes (** for any folders):
  .txt      one document, byte for byte: no line end is changed
  .jsonl    one document a line, {"text": "..."}; blank lines are passed over
  .parquet  one document a row, in the column text (needs: pip install 'rwkvtune[parquet]')
The first two also compressed by gzip or zstd: .txt.gz, .jsonl.zst. Text is UTF-8. Token 0 follows
each document; a document without text is kept as that token alone."""

ORDER_HELP = """Order, in this sequence:
  1. Documents are in the order of the INPUTs; files of a folder or glob by path.
  2. Validation, with --val_share S: whole documents with a share S of the tokens (or more, by
     the last one that is needed): those at the end, or with --seed drawn at random. A single
     document is cut at character int(length * (1 - S)). They are written once, in the order of 1.,
     to PREFIX_val.bin and .idx, and training never contains them.
  3. Training, without --seed: the other documents in the order of 1., --n_epoch times.
     With --seed N: random.Random(N) shuffles them for the first epoch, and the result again for
     each further one: the same bytes as from RWKV-LM's make_data after random.seed(N).

Each document is checked to decode back to its own bytes. Memory does not grow with the text, save
some 60 bytes a document; a line of .jsonl and a row of Parquet are held whole. The folder of PREFIX
needs room for the tokens twice. All files appear together at the end or, when anything fails or is
interrupted, none; older files of these names are replaced only then."""

INSPECT_HELP = """Print what PREFIX.bin and PREFIX.idx hold: numbers of documents, items and tokens,
dtype, largest id, tokenizer, magic prime, a histogram of document lengths, the first and the last
document."""


def main(argv: list[str]) -> int:
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "build": (build, "text to token files"),
        "inspect": (inspect, "what token files hold"),
    }
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: rwkvtune data COMMAND [options]\n\ncommands:")
        for name, (_, text) in commands.items():
            print(f"  {name:<8} {text} (rwkvtune data {name} --help)")
        return 0 if argv else 2
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        raise UserError(f"unknown command {argv[0]!r} of rwkvtune data: {hint}")
    return commands[argv[0]][0](argv[1:])


def build(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune data build", BUILD_HELP)
    parser.epilog = ORDER_HELP
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, or globs in quotes")
    add("--output", metavar="PREFIX", help="where to write: PREFIX.bin and so on")
    add(
        "--tokenizer",
        metavar="NAME",
        help="world (65536 ids, for released weights), bytes (257 ids), chars (the characters of "
        "this text), or a file: a vocabulary in RWKV's format (lines `<id> <Python string> <length "
        "in bytes>`) or a tokenizer.json of ours",
    )
    add(
        "--val_share", type=float, default=0.0, metavar="S", help="share for validation (default 0)"
    )
    add("--seed", type=int, metavar="N", help="shuffle, with this seed; without it, keep the order")
    add(
        "--n_epoch", type=int, default=1, metavar="N", help="training documents N times (default 1)"
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that tokenize; 0 or 1: none but this one (default: one for each core, at "
        "most 16, where the input is large enough). With world each takes about 440 MB",
    )
    add("--ctx_len", type=int, default=512, metavar="T", help="for the magic prime (default 512)")
    add(
        "--text_key",
        default="text",
        metavar="NAME",
        help="JSON field or Parquet column of the text",
    )
    args = parser.parse_intermixed_args(argv)
    # Asked for here: the parser would ask before it names a flag that is misspelled.
    if not args.output:
        raise UserError("--output is missing: give a prefix such as data/my")
    if not args.tokenizer:
        raise UserError("--tokenizer is missing: give world, bytes, chars or a vocabulary file")
    _check_ctx_len(args.ctx_len)
    from rwkvtune.data.build import build_token_files
    from rwkvtune.data.report import about_built

    with progress_line() as on_progress:
        built = build_token_files(
            args.inputs,
            args.output,
            args.tokenizer,
            val_share=args.val_share,
            seed=args.seed,
            n_epoch=args.n_epoch,
            workers=args.workers,
            text_key=args.text_key,
            on_progress=on_progress,
        )
    output.write("\n".join(about_built(built, args.ctx_len)) + "\n")
    return 0


def inspect(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune data inspect", INSPECT_HELP)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="of the files, or the name of either")
    add("--tokenizer", metavar="NAME", help="world, bytes or a file (default: the one kept beside)")
    add("--ctx_len", type=int, default=512, metavar="T", help="for the magic prime (default 512)")
    args = parser.parse_intermixed_args(argv)
    _check_ctx_len(args.ctx_len)
    from rwkvtune.data.report import about_token_files
    from rwkvtune.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    output.write("\n".join(about_token_files(args.prefix, tokenizer, args.ctx_len)) + "\n")
    return 0


@contextmanager
def progress_line() -> Iterator[Callable[[Progress], object]]:
    """On a terminal, a line with megabytes read and their speed; it is gone at the end."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Bar(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
        tasks = {}

        def show(progress: Progress) -> None:
            if progress.step not in tasks:
                tasks[progress.step] = bar.add_task(progress.step, total=None)
            total = progress.total_bytes or None
            bar.update(tasks[progress.step], completed=progress.done_bytes, total=total)

        yield show


def _check_ctx_len(ctx_len: int) -> None:
    if ctx_len < 1:
        raise UserError(f"ctx_len={ctx_len}: expected 1 or more.")
