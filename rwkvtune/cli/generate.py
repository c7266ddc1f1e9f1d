"""`rwkvtune generate`: text from a model, on the terminal as it comes."""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvtune.cli import output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.weights import header_of, version_of
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.inference.settings import check_settings
from rwkvtune.models import config_from_shapes
from rwkvtune.weights_header import newest_weights, numbered_weights

if TYPE_CHECKING:
    from rwkvtune.data.tokenizers import Tokenizer
    from rwkvtune.models.frame import LanguageModel

ABOUT = """Let a model write, from a prompt or from nothing.

  rwkvtune generate out/first --prompt "Once upon a time" --temperature 0.8
  rwkvtune generate RWKV-x070-World-0.1B.pth < prompt.txt > continuation.txt

The text goes to stdout, all else to stderr. A pipe or file gets its exact bytes; a terminal sees
control characters as \\x1b. Memory stays the same for a prompt and a text of any length."""

UNSAFE_ON_A_TERMINAL = str.maketrans(
    {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
    # What turns the direction of the text around it.
    | {c: f"\\u{c:04x}" for c in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    # Bytes that are no UTF-8, as `surrogateescape` carries them.
    | dict.fromkeys(range(0xDC80, 0xDD00), "\N{REPLACEMENT CHARACTER}")
)


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    checked(args)
    if "" in args.stop:
        raise UserError("--stop is empty: give a text, or leave it out")
    path = weights_of(args.file)
    vocab_size = vocab_size_of(path)
    from rwkvtune.inference.tokenizer import tokenizer_for, without_text

    tokenizer = tokenizer_for(path, vocab_size, args.tokenizer, note)
    prompt = prompt_text(args.prompt)
    prompt_ids = tokenizer.encode(prompt)

    model = load(path, args.device, args.dtype, args.threads)
    if args.state is not None:
        begin_with(model, args.state, path, is_exact=args.dtype == "fp32")
    from rwkvtune.data.tokenizers import END_OF_DOCUMENT
    from rwkvtune.inference.generate import generate

    ids = generate(
        model,
        prompt_ids,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        stop_ids=() if args.ignore_end else (END_OF_DOCUMENT,),
        banned_ids=without_text(tokenizer, vocab_size),
    )
    return stream(
        tokenizer,
        ids,
        prompt_tokens=len(prompt_ids),
        max_tokens=args.max_tokens,
        echoed=prompt if args.echo else "",
        stops=args.stop,
    )


def make_parser() -> OneLineParser:
    parser = OneLineParser("rwkvtune generate", ABOUT)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="weights (.pth, .safetensors) or a run folder")
    add("--prompt", metavar="TEXT", help="text to go on from; without it, stdin if that is no "
        "terminal (exact bytes), else the start of a document")  # fmt: skip
    add_sampling_flags(parser, max_tokens=200, top_p=1.0)
    add_state_flag(parser)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be "
        "given several times")  # fmt: skip
    add("--ignore_end", action="store_true", help="go on after the end of a document (id 0)")
    add("--echo", action="store_true", help="write the prompt before its continuation")
    add_computing_flags(parser)
    return parser


def add_sampling_flags(parser: OneLineParser, *, max_tokens: int, top_p: float) -> None:
    """How tokens are chosen; the defaults differ from command to command."""
    add = parser.add_argument
    add(
        "--max_tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"most tokens to write ({max_tokens})",
    )
    add("--temperature", type=float, default=1.0, metavar="X", help="below 1 = safer, above = "
        "bolder, 0 = always the likeliest token (1.0)")  # fmt: skip
    add("--top_p", type=float, default=top_p, metavar="P", help="keep the fewest likeliest "
        f"tokens whose probabilities reach P; 1 = all ({top_p})")  # fmt: skip
    add("--top_k", type=int, default=0, metavar="N", help="keep the N likeliest tokens (0 = all)")
    add("--presence_penalty", type=float, default=0.0, metavar="X", help="taken off the logit of "
        "a token that was written before (0)")  # fmt: skip
    add("--frequency_penalty", type=float, default=0.0, metavar="X", help="taken off the logit "
        "for each time a token was written before (0)")  # fmt: skip
    add("--seed", type=int, metavar="N", help="the same seed writes the same text again")


def add_state_flag(parser: OneLineParser) -> None:
    parser.add_argument("--state", type=Path, metavar="FILE", help="a tuned initial state: "
        "state.pth, or the adapter folder or run folder that holds it")  # fmt: skip


def add_computing_flags(parser: OneLineParser) -> None:
    """The tokenizer, and where and how the model runs."""
    add = parser.add_argument
    add("--tokenizer", default="", metavar="bytes|world|FILE", help="default: the one kept with "
        "the weights; world for weights of 65536 ids that have none")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = a GPU that torch "
        "sees, else the CPU")  # fmt: skip
    add("--threads", type=int, default=0, metavar="N", help="CPU threads, 0 = torch's choice; on "
        "a busy machine 1 may be the fastest (0)")  # fmt: skip
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matrices: bf16 takes "
        "half the memory (fp32)")  # fmt: skip


def checked(args: Namespace) -> None:
    """UserError for values of these flags that make no sense."""
    check_settings(
        args.temperature,
        args.top_k,
        args.top_p,
        args.presence_penalty,
        args.frequency_penalty,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    if args.threads < 0:
        raise UserError(f"--threads is {args.threads}: give 1 or more, or 0 for torch's choice")


def weights_of(file: Path) -> Path:
    """The weights file itself, or the newest one of a run folder."""
    if not file.is_dir():
        return file
    path, numbered = newest_weights(file), [p for _, p in numbered_weights(file)]
    line = f"weights: {path}"
    # A run that was made longer: its rwkv-final.pth is of the end that it had before.
    if path not in numbered and numbered and numbered[-1].stat().st_mtime > path.stat().st_mtime:
        line += f" ({numbered[-1].name} was written after it)"
    note(line)
    return path


def vocab_size_of(path: Path) -> int:
    """UserError for what is no model that we can run, before it is loaded."""
    header = header_of(path)
    version_of(path, header)
    try:
        return config_from_shapes({n: t.shape for n, t in header.tensors.items()}).vocab_size
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def prompt_text(given: str | None) -> str:
    """--prompt, else all of stdin unless it is a terminal; UserError for what is not UTF-8."""
    if given is not None:
        content, source = given.encode("utf-8", "surrogateescape"), "--prompt"
    elif sys.stdin is None or sys.stdin.isatty():
        return ""
    else:
        note("prompt: from stdin")  # before it is read: whoever forgot it would wait for nothing
        content, source = sys.stdin.buffer.read(), "the prompt on stdin"
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x} "
            f"({error.reason})"
        ) from None


def load(path: Path, device: str, dtype: str, threads: int) -> LanguageModel:
    import torch

    from rwkvtune.inference.load import load_model

    if threads:
        torch.set_num_threads(threads)
    sees_gpu = torch.cuda.is_available()
    if device == "cuda" and not sees_gpu:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    if device == "auto":
        device = "cuda" if sees_gpu else "cpu"
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    try:
        return load_model(path, device=device, dtype=kind)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{path} does not fit the GPU's memory as {dtype}: use --dtype bf16, or --device cpu"
        ) from error


def begin_with(model: LanguageModel, given: Path, base_path: Path, *, is_exact: bool) -> None:
    """Let a model begin with the state of a file; UserError for one of another base.

    is_exact: the model holds the values of its file, so they can be compared.
    """
    from rwkvtune.adapters import adapter, state
    from rwkvtune.adapters.base import Base, base_of

    folder = adapter_folder(given) if given.is_dir() else given.parent
    about = adapter.read_about(folder)
    if about is not None and is_exact:
        Base(**about["base"]).check(base_of(model, str(base_path)), str(given))
    state.take(model, state.load(folder if given.is_dir() else given), str(given))


def adapter_folder(path: Path) -> Path:
    """The folder itself, or the newest adapter of a run folder."""
    if not path.is_dir():
        raise MissingFileError(f"there is no adapter folder {path}")
    found = ((re.fullmatch(r"adapter-(\d+|final)", p.name), p) for p in path.glob("adapter-*"))
    adapters = [p for match, p in found if match and p.is_dir()]
    if not adapters:
        return path
    newest = max(adapters, key=lambda p: p.stat().st_mtime)
    note(f"adapter: {newest}")
    return newest


def stream(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    *,
    prompt_tokens: int,
    max_tokens: int,
    echoed: str,
    stops: list[str],
) -> int:
    """Write the text as it comes, and then on stderr how it ended and how fast; the exit code."""
    from rwkvtune.inference.generate import stream_text, until

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    times = [time.perf_counter()]
    how = "a stop text"

    def counted() -> Iterator[int]:
        nonlocal how
        for id in ids:
            times.append(time.perf_counter())
            yield id
        how = "max_tokens" if len(times) > max_tokens else "the end of the document"

    def put(text: str) -> None:
        output.write(text.translate(UNSAFE_ON_A_TERMINAL) if is_terminal else text)

    last, code = echoed, 0
    pieces = until(stream_text(tokenizer, counted(), errors="surrogateescape"), stops)
    try:
        # With the first piece, so that what the model says on stderr at its start comes before.
        put(echoed + next(pieces, ""))
        for piece in pieces:
            put(piece)
            last = piece
    except KeyboardInterrupt:
        how, code = "Ctrl-C", 130
    if is_terminal and not last.endswith("\n"):
        put("\n")
    count = len(times) - 1
    note(f"{count} token{'s' * (count != 1)}, ended by {how}" + speed(times, prompt_tokens))
    return code


def speed(times: list[float], prompt_tokens: int) -> str:
    """times: of the start and of each token, in seconds."""
    if len(times) < 3:
        return ""
    begin, first, last = times[0], times[1], times[-1]
    rate = f"; {(len(times) - 2) / (last - first):.1f} tokens/s"
    return rate + (f", prompt of {prompt_tokens} in {first - begin:.2f} s" if prompt_tokens else "")


def note(text: str) -> None:
    print(text, file=sys.stderr)
