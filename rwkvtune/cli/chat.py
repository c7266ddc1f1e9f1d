"""`rwkvtune chat`: talk with a model on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvtune.cli import output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.generate import (
    UNSAFE_ON_A_TERMINAL,
    add_computing_flags,
    add_sampling_flags,
    add_state_flag,
    begin_with,
    checked,
    load,
    note,
    vocab_size_of,
    weights_of,
)
from rwkvtune.errors import UserError

if TYPE_CHECKING:
    from rwkvtune.data.chat import Template
    from rwkvtune.inference.chat import Chat, ChatSettings

COMMANDS = {
    "/save FILE": "write the conversation and the model's state (.safetensors)",
    "/load FILE": "go on with a saved one",
    "/history": "show what was said",
    "/reset": "forget all but the system message",
    "/exit": "leave (Ctrl-D too)",
}

ABOUT = """Talk with a model, whose answers come as they are written.

  rwkvtune chat out/tuned
  rwkvtune chat rwkv7-g1-0.1b.pth --system "Answer in one sentence." --top_p 0.5
  echo "What is a noun?" | rwkvtune chat out/tuned

Each line is a turn of yours; Ctrl-C ends an answer. From a pipe each line is a turn too, and the
answers alone go to stdout; a line that begins with / and is none of the commands ends it with an
error (exit code 2), so that a script does not go on with a chat that it did not mean. Commands:

""" + "\n".join(f"  {name:<12}{about}" for name, about in COMMANDS.items())

PROMPT = "> "


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    checked(args)
    if args.system and args.load:
        raise UserError("--load brings its own system message: leave --system out")
    path = weights_of(args.file)
    vocab_size = vocab_size_of(path)
    template = template_for(path, args.template)
    from rwkvtune.inference.tokenizer import tokenizer_for

    tokenizer = tokenizer_for(path, vocab_size, args.tokenizer, note)
    model = load(path, args.device, args.dtype, args.threads)
    if args.state is not None:
        begin_with(model, args.state, path, is_exact=args.dtype == "fp32")
    from rwkvtune.inference.chat import Chat, ChatSettings

    chat = Chat(model, tokenizer, template)
    if args.system:
        chat.messages = [{"role": "system", "content": args.system}]
    if args.load:
        load_state(chat, args.load)
    settings = ChatSettings(
        args.max_tokens,
        args.temperature,
        args.top_p,
        args.top_k,
        args.presence_penalty,
        args.frequency_penalty,
        args.seed,
    )
    talk(chat, settings)
    return 0


def make_parser() -> OneLineParser:
    parser = OneLineParser("rwkvtune chat", ABOUT)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="weights (.pth, .safetensors) or a run folder")
    add("--system", default="", metavar="TEXT", help="what the model is told before the first turn")
    add("--load", default="", metavar="FILE", help="a state that /save wrote, to go on with")
    add("--template", default="", metavar="g1|world|FILE", help="how turns are written; default: "
        "the one kept with the weights, else g1")  # fmt: skip
    add_sampling_flags(parser, max_tokens=500, top_p=0.3)
    add_state_flag(parser)
    add_computing_flags(parser)
    return parser


def template_for(path: Path, spec: str) -> Template:
    from rwkvtune.data.chat import find_template, load_template

    if spec:
        return load_template(spec)
    found = find_template(path)
    if found is None:
        note(f"template: none is kept with {path}, g1 is assumed")
    return found or load_template("g1")


def talk(chat: Chat, settings: ChatSettings) -> None:
    """Turn after turn, until the input ends or /exit."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        note(f"commands: {', '.join(COMMANDS)}; Ctrl-C ends an answer")
    for line in lines(is_terminal):
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                command(chat, line)
            else:
                answer(chat.reply(line, settings))
        except UserError as error:
            if not is_terminal:
                raise
            note(f"error: {error}")


def lines(is_terminal: bool) -> Iterator[str]:
    """What the user says, without blank lines."""
    if is_terminal:
        import readline  # noqa: F401  (editing and earlier lines in input())
    while True:
        try:
            line = input(PROMPT if is_terminal else "")
        except EOFError:
            if is_terminal:
                output.write("\n")
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            output.write("\n")
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not UTF-8: {error}") from None
        if line.strip():
            yield line.strip()


def answer(pieces: Iterator[str]) -> None:
    """Write an answer as it comes; Ctrl-C ends it."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    try:
        for piece in pieces:
            output.write(piece.translate(UNSAFE_ON_A_TERMINAL) if is_terminal else piece)
    except KeyboardInterrupt:
        note("\n(ended by Ctrl-C)")
        return
    output.write("\n")


def command(chat: Chat, line: str) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    known: dict[str, Callable[[], None]] = {
        "/save": lambda: save_state(chat, argument),
        "/load": lambda: load_state(chat, argument),
        "/history": lambda: show_history(chat),
        "/reset": chat.reset,
    }
    if name not in known:
        raise UserError(
            f"unknown command {name}: there are {', '.join(COMMANDS)}; a turn cannot begin with /"
        )
    if name in ("/save", "/load") and not argument:
        raise UserError(f"{name} needs the name of a file: {name} talk.safetensors")
    known[name]()


def save_state(chat: Chat, path: str) -> None:
    chat.save(Path(path))
    note(f"saved {path}: {len(chat.messages)} turns")


def load_state(chat: Chat, path: str) -> None:
    chat.load(Path(path))
    note(f"loaded {path}: {len(chat.messages)} turns")


def show_history(chat: Chat) -> None:
    for message in chat.messages:
        note(f"{message['role']}: {message['content']}".translate(UNSAFE_ON_A_TERMINAL))
