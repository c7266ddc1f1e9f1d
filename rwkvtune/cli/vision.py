"""`rwkvtune vision train|generate|eval`: adapters that let a language model see pictures."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.launcher import told_once, vision_for_launcher
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.training import vision_config
from rwkvtune.training.config import unknown_settings
from rwkvtune.training.vision_config import VisionConfig, from_flat, setting_types

USAGE = """usage: rwkvtune vision COMMAND [options]

Let an RWKV-7 see pictures.

commands:
  train     train an adapter between a picture encoder and a language model, or both of them
  generate  ask about pictures
  eval      score answers to a file of questions
  demo      train on drawn pictures and score new ones, on the CPU, in minutes

`python world_train.py` takes the published flags; docs/vision.md tells the whole way."""

TRAIN = """Train a vision adapter, or go on with the run in --proj_dir.

  rwkvtune vision train --load_model rwkv7.pth --encoder_path siglip --data_file data \\
      --proj_dir out/stage1
  rwkvtune vision train --config out/stage1/config.yaml --train_step "adapter rwkv" --lr_init 2e-5

Settings come from --config and then from flags, which win. The same command goes on with a run
that was stopped."""

GENERATE = """Ask about pictures; the state is carried from question to question.

  rwkvtune vision generate out/stage1 --image a.jpg --prompt "What is this?" --prompt "And where?"
  rwkvtune vision generate out/stage1 --image a.jpg     (a question per line of stdin)

FILE is a run folder, an adapter-*.safetensors, or a published multimodal .pth."""

EVAL = """Score answers to questions, one JSON object a line:

  {"image": "a.jpg", "text": "Which colour?", "answer": "red", "options": ["red", "blue"]}

Answers are compared with what the model writes (exact match, without case and end marks); where
there are options, the likeliest of them is compared too."""


DEMO = """Draw pictures, train a small model to answer about them in two stages, and score it on
combinations that it has never seen; exit code 1 when it does not beat the baselines."""


def main(argv: list[str]) -> int:
    commands = {"train": train, "generate": generate, "eval": evaluate, "demo": demo}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        raise UserError(f"unknown command {argv[0]!r}: there are {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def train(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune vision train", TRAIN)
    add_settings(parser)
    values = parse_settings(parser, argv)
    return start(from_flat(values), is_default_devices="devices" not in values)


def start(
    config: VisionConfig,
    *,
    is_default_devices: bool,
    notes: Sequence[str] = (),
    rows: Sequence[tuple[str, str]] = (),
) -> int:
    """Train as `config` says, on the devices that a launcher may have chosen; the exit code."""
    with told_once():
        config = vision_for_launcher(config, os.environ, is_default=is_default_devices)
        from rwkvtune.training.vision import train_vision  # torch: seconds

        return train_vision(config, notes=notes, rows=rows)


def add_settings(parser: OneLineParser) -> None:
    """A flag for each field of VisionConfig."""
    parser.usage = f"{parser.prog} [--config FILE] [--SETTING VALUE ...]"
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    told = field_docs()
    for field in dataclasses.fields(VisionConfig):
        hint = setting_types()[field.name]
        default = "" if field.default in ("", None) else f" ({field.default})"
        parser.add_argument(
            f"--{field.name}",
            nargs="+" if field.name == "train_step" else "?" if hint is bool else None,
            const="true" if hint is bool else None,
            default=None,
            metavar=metavar_of(hint),
            help=f"{told[field.name]}{default}".replace("%", "%%"),
        )


def field_docs() -> dict[str, str]:
    """The docstring under each field of VisionConfig."""
    tree = ast.parse(inspect.getsource(vision_config))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef))
    docs = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def metavar_of(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    kinds = {bool: "0|1", int: "N", float: "X", str: "TEXT"}
    parts = get_args(hint) or (hint,)
    return kinds.get(parts[0], "TEXT")


def parse_settings(parser: OneLineParser, argv: Sequence[str]) -> dict[str, Any]:
    """The settings that were given, by name: those of --config, then the flags; and all other flags
    that the parser knows."""
    args = vars(parser.parse_args(argv))
    types = setting_types()
    values: dict[str, Any] = {}
    config = args.pop("config")
    if config is not None:
        values |= read_config(Path(config))
    for name, value in args.items():
        if value is not None:
            words = " ".join(value) if isinstance(value, list) else value
            values[name] = typed(name, words, types[name]) if name in types else words
    return values


def read_config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise MissingFileError(f"--config {path}: there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config {path}: this is no YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines such as `lr_init: 1e-3`")
    types = setting_types()
    unknown = [name for name in content if name not in types]
    if unknown:
        raise UserError(unknown_settings(unknown, known=types, command="rwkvtune vision train"))
    return {
        name: typed(name, value, types[name]) if isinstance(value, str) else value
        for name, value in content.items()
    }


def typed(name: str, text: str, hint: Any) -> Any:
    """A flag's text as the type of its setting; what does not fit stays text, for
    VisionConfig.problems to tell."""
    parts = get_args(hint) if get_origin(hint) is not Literal else ()
    kinds = parts or (hint,)
    if bool in kinds and text.lower() in ("0", "1", "true", "false"):
        return text.lower() in ("1", "true")
    if name == "devices" and text == "-1":
        return "auto"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return None if type(None) in kinds and text == "" else text


def generate(argv: list[str]) -> int:
    parser = _system_parser("rwkvtune vision generate", GENERATE)
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="a picture; several may be "
        "given, which stand before the first question")  # fmt: skip
    add("--prompt", action="append", metavar="TEXT", help="a question; several are asked one "
        "after the other; without it, the lines of stdin")  # fmt: skip
    add("--max_tokens", type=int, default=500, metavar="N", help="longest answer (500)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0 = always the likeliest "
        "token (0)")  # fmt: skip
    add("--top_p", type=float, default=1.0, metavar="P", help="keep the fewest likeliest tokens "
        "whose probabilities reach P (1 = all)")  # fmt: skip
    add("--seed", type=int, metavar="N", help="the same seed gives the same answer again")
    args = parser.parse_args(argv)
    from rwkvtune.cli import output
    from rwkvtune.data.images import read_picture
    from rwkvtune.inference.generate import stream_text
    from rwkvtune.inference.settings import check_settings
    from rwkvtune.inference.vision import VisionChat

    check_settings(
        args.temperature, 0, args.top_p, 0.0, 0.0, max_tokens=args.max_tokens, seed=args.seed
    )
    pictures = [read_picture(name, name) for name in args.image]
    system = _load(args)
    chat = VisionChat(system)
    for number, question in enumerate(args.prompt or _lines_of_stdin()):
        ids = chat.ask(
            question,
            () if number else pictures,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )
        for i, piece in enumerate(stream_text(system.tokenizer, ids)):
            output.write(piece.lstrip() if i == 0 else piece)
        output.write("\n")
    return 0


def _lines_of_stdin() -> Any:
    return (line.rstrip("\n") for line in sys.stdin if line.strip())


def evaluate(argv: list[str]) -> int:
    parser = _system_parser("rwkvtune vision eval", EVAL)
    add = parser.add_argument
    add("--questions", type=Path, required=True, metavar="FILE", help="JSON lines")
    add("--image_folder", type=Path, metavar="DIR", help="where the pictures are (beside "
        "--questions); images.zip in it is read too")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="write scores and every answer here, as JSON")
    add("--max_tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    add("--batch_size", type=int, default=16, metavar="N", help="questions at once (16)")
    add("--without_pictures", action="store_true", help="ask without the pictures: what the "
        "words alone tell")  # fmt: skip
    args = parser.parse_args(argv)
    if args.max_tokens < 1 or args.batch_size < 1:
        raise UserError("--max_tokens and --batch_size must be at least 1")
    if args.image_folder is not None and not args.image_folder.is_dir():
        raise UserError(f"--image_folder {args.image_folder}: there is no such folder")
    from rwkvtune.evaluation.vision import evaluate_questions, read_questions, table
    from rwkvtune.files import check_writable

    questions = read_questions(args.questions)
    if args.output is not None:
        check_writable(args.output)
    result = evaluate_questions(
        _load(args),
        questions,
        picture_folder=args.image_folder or args.questions.parent,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        with_pictures=not args.without_pictures,
    )
    print(table(result))
    if args.output is not None:
        result.write(args.output)
        print(f"wrote {args.output}")
    return 0


def demo(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune vision demo", DEMO)
    parser.add_argument("--proj_dir", type=Path, default=Path("out/demo-vision"), metavar="DIR",
                        help="folder of all files (out/demo-vision)")  # fmt: skip
    folder: Path = parser.parse_args(argv).proj_dir
    from rwkvtune.demo.vision import run_vision_demo

    return run_vision_demo(folder)


def _system_parser(command: str, about: str) -> OneLineParser:
    parser = OneLineParser(command, about)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="run folder, adapter or multimodal file")
    add("--load_model", default="", metavar="FILE", help="language model, in place of the one that "
        "the adapter was trained with")  # fmt: skip
    add("--encoder_path", default="", metavar="DIR", help="encoder, in place of the one that the "
        "adapter was trained with")  # fmt: skip
    add("--encoder_type", default="", metavar="KIND", help="siglip, clip or dinov2")
    add("--tokenizer", default="", metavar="bytes|world|FILE", help="in place of the one kept with "
        "the weights")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = a GPU that torch "
        "sees, else the CPU")  # fmt: skip
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matrices (fp32)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads, 0 = torch's choice (0)")
    return parser


def _load(args: Any) -> Any:
    import torch

    from rwkvtune.inference.vision import load_vision

    if args.threads:
        torch.set_num_threads(args.threads)
    sees_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not sees_gpu:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = ("cuda" if sees_gpu else "cpu") if args.device == "auto" else args.device
    system = load_vision(
        args.file,
        load_model=args.load_model,
        encoder_path=args.encoder_path,
        encoder_type=args.encoder_type,
        tokenizer=args.tokenizer,
        device=device,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype],
    )
    for note in system.notes:
        print(note, file=sys.stderr)
    return system
