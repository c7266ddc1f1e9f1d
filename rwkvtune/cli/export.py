"""`rwkvtune export`: weights in the forms of other RWKV programs, and back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvtune.cli import output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.errors import UserError
from rwkvtune.export import FORMATS

if TYPE_CHECKING:
    from rwkvtune.data.tokenizers import Tokenizer
    from rwkvtune.export.source import Source

ABOUT = """Turn weights into the form that another RWKV program reads, or back.

  rwkvtune export out/first model.gguf --to gguf --dtype q8_0
  rwkvtune export out/first my-model --to hf
  rwkvtune export my-model back.pth --to pth

FILE may be a .pth, .safetensors, .st or .gguf file, a run folder (its newest weights), or a Hugging
Face folder of flash-linear-attention's RWKV7. Nothing is there until all of it is.

formats:
""" + "\n".join(
    f"  {name:<12}{form.suffix or 'folder':<13}{'/'.join(form.versions):<16}{form.readers}"
    for name, form in FORMATS.items()
)


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.shard_gb <= 0:
        raise UserError(f"--shard_gb is {args.shard_gb:g}: give the size of a file in GB, above 0")
    from rwkvtune.export.convert import check_request, export_weights
    from rwkvtune.export.source import open_source

    begin = time.perf_counter()
    check_request(args.file, args.out, args.to, dtype=args.dtype, overwrite=args.overwrite)
    source = open_source(args.file)
    done = export_weights(
        source,
        args.out,
        args.to,
        dtype=args.dtype,
        tokenizer=tokenizer_for(source, args.tokenizer, args.to),
        overwrite=args.overwrite,
        shard_bytes=round(args.shard_gb * 1e9),
    )
    for text in done.notes:
        note(text)
    seconds = time.perf_counter() - begin
    output.write(
        f"{done.path}: {source.config.version}, {len(source.weights)} tensors of {source.path}, "
        f"{done.num_bytes / 1e6:,.1f} MB, {seconds:.1f} s\n"
    )
    return 0


def make_parser() -> OneLineParser:
    parser = OneLineParser("rwkvtune export", ABOUT)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="weights, a run folder or a Hugging Face folder")
    add("out", type=Path, metavar="OUT", help="file or folder to make")
    add("--to", required=True, choices=list(FORMATS), help="form to write")
    add("--dtype", choices=["fp32", "bf16", "fp16", "q8_0"], help="of the matrices; gguf keeps "
        "vectors and small matrices in fp32 (default: as they are, st: fp16)")  # fmt: skip
    add("--tokenizer", default="", metavar="bytes|world|FILE", help="default: the one kept with "
        "the weights; for hf and gguf, world for weights of 65536 ids that have none")  # fmt: skip
    add("--shard_gb", type=float, default=5.0, metavar="X", help="largest file of a Hugging Face "
        "folder, GB (5)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace OUT if it is there")
    return parser


def tokenizer_for(source: Source, spec: str, to: str) -> Tokenizer | None:
    """The tokenizer named by spec, else the one kept with the weights, else World where its size
    says so and the form holds a tokenizer; UserError when it has more ids than the model."""
    from rwkvtune.data.tokenizers import load_tokenizer
    from rwkvtune.inference.tokenizer import WORLD_ROWS

    vocab_size = source.config.vocab_size
    tokenizer = load_tokenizer(spec) if spec else source.tokenizer
    if tokenizer is None and to in ("hf", "gguf") and vocab_size in WORLD_ROWS:
        note(f"tokenizer: none is kept with {source.path}, world is assumed for {vocab_size} ids")
        tokenizer = load_tokenizer("world")
    if tokenizer is not None:
        needed = 1 + max(set(range(tokenizer.vocab_size)) - set(tokenizer.unused_ids))
        if needed > vocab_size:
            raise UserError(
                f"the tokenizer {tokenizer.name} has ids up to {needed - 1}, {source.path} knows 0 "
                f"to {vocab_size - 1}: give --tokenizer the one that it was trained with"
            )
    return tokenizer


def note(text: str) -> None:
    print(text, file=sys.stderr)
