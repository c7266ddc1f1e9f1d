"""`rwkvtune alternating`: look into alternating models, compare them, and ask them."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.errors import UserError
from rwkvtune.models.alternating.variants import Variant

if TYPE_CHECKING:
    from rwkvtune.evaluation.alternating import VisualAttention

ABOUT = """Look into alternating-attention models, compare them, and ask them.

  rwkvtune alternating masks --model M --data_path samples.json
  rwkvtune alternating attention --model M --data_path questions.json --output out/attention
  rwkvtune alternating eval --model M --data_path questions.json --baseline BASE
  rwkvtune alternating sweep --model BASE --data_path train.json --test_path test.json
      --output out/sweep --schedules alternate_keep_last,first_k:2 -- --max_steps 200
  rwkvtune alternating export --model M --naming hf --output out/exported

`rwkvtune alternating COMMAND --help` tells the rest."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: rwkvtune alternating COMMAND [options]\n\n{ABOUT}")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise UserError(
            f"rwkvtune alternating has no command {argv[0]!r}: there are {', '.join(COMMANDS)}"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # not used, but imported
    return COMMANDS[argv[0]](argv[1:])


def _parser(name: str, about: str, *, data: str = "") -> OneLineParser:
    parser = OneLineParser(f"rwkvtune alternating {name}", about)
    parser.add_argument("--model", required=True, help="folder of a checkpoint, in any naming")
    if data:
        parser.add_argument("--data_path", required=True, help=data)
        parser.add_argument("--image_folder", default="", help="where image paths begin")
        parser.add_argument("--version", default="qwen_2", help="template (default: qwen_2)")
    return parser


def _with_masks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant", choices=get_args(Variant), help="another class with the same weights"
    )
    parser.add_argument("--schedule", default="", help="other special layers")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, 0 = all")
    return int(text)


def _loaded(args: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint, with the class and schedule of the flags."""
    from rwkvtune.inference.alternating import Checkpoint, load
    from rwkvtune.models.alternating.tokenizer import load_tokenizer

    checkpoint = Checkpoint.open(name)
    masks = {"mask_schedule": args.schedule} if getattr(args, "schedule", "") else {}
    model, _ = load(checkpoint, variant=getattr(args, "variant", None), **masks)
    return model, load_tokenizer(checkpoint.folder)


def _needs_tower(model: Any, name: str) -> None:
    from rwkvtune.inference.alternating import is_composed

    if not is_composed(model):
        raise UserError(f"{name} is a language model alone: it sees no images")


def masks(argv: list[str]) -> int:
    parser = _parser(
        "masks",
        "Show which token may attend to which in every layer, for a real sample, and how many\n"
        "pairs that are. Loads the tokenizer and config.json, no weights.",
        data="LLaVA manifest",
    )
    _with_masks(parser)
    parser.add_argument("--index", type=int, default=0, help="which sample (default: 0)")
    parser.add_argument("--output", type=Path, help="also draw all layers into this PNG")
    parser.add_argument("--width", type=int, default=64, help="characters (default: 64)")
    args = parser.parse_args(argv)
    if args.width < 1:
        raise UserError(f"--width {args.width}: give 1 or more characters")
    from rwkvtune.evaluation.alternating_view import (
        draw_masks,
        layer_views,
        mask_as_text,
        runs_in_words,
    )
    from rwkvtune.inference.alternating import Checkpoint, sample_modalities

    checkpoint = Checkpoint.open(args.model)
    config, ids = sample_modalities(
        checkpoint,
        args.data_path,
        args.index,
        image_folder=args.image_folder,
        version=args.version,
        variant=args.variant,
        schedule=args.schedule,
    )
    views = layer_views(config, ids)
    print(f"{len(ids)} tokens: {runs_in_words(ids)}")
    shown: set[str] = set()
    for view in views:
        print(f"layer {view.layer}: {view.kind}, {view.pairs:,} pairs, {view.share:.1%} of causal")
        if view.kind not in shown:
            print(mask_as_text(view.mask, args.width))
            shown.add(view.kind)
    if args.output:
        draw_masks(views, args.output)
        print(f"wrote {args.output}")
    return 0


def attention(argv: list[str]) -> int:
    parser = _parser(
        "attention",
        "Measure, layer by layer, how much of the last prompt token's attention lies on visual\n"
        "tokens: per head and per image, sample after sample, into a table and a plot.",
        data="questions: BLINK's form or LLaVA's",
    )
    _with_masks(parser)
    parser.add_argument("--limit", type=_count, default=0, help="samples (default: all)")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.csv and .png")
    args = parser.parse_args(argv)
    from rwkvtune.evaluation.alternating import Prompts, read_questions, visual_attention
    from rwkvtune.evaluation.alternating_view import AttentionTable, draw_attention
    from rwkvtune.inference.alternating import processor_of

    questions = read_questions(args.data_path, image_folder=args.image_folder)
    questions = [q for q in questions if q.pictures][: args.limit or None]
    if not questions:
        raise UserError(f"{args.data_path} has no question with a picture")
    model, tokenizer = _loaded(args, args.model)
    _needs_tower(model, args.model)
    prompts = Prompts(tokenizer, processor_of(model.config), args.version)

    def samples() -> Iterator[tuple[str, VisualAttention]]:
        for question in questions:
            yield question.id, visual_attention(model, prompts.inputs(question))

    table = AttentionTable()
    csv_path, png_path = (args.output.with_name(args.output.name + end) for end in (".csv", ".png"))
    table.write(csv_path, samples())
    mean, _ = table.mean_and_spread()
    text = model.config.get_text_config()
    special = text.special_layers() if hasattr(text, "mask_schedule") else [False] * len(mean)
    draw_attention(table, special, png_path)
    for layer, share in enumerate(mean.mean(1).tolist()):
        print(f"layer {layer}{' (special)' if special[layer] else ''}: {share:.4f}")
    print(f"{table.count} samples; wrote {csv_path} and {png_path}")
    return 0


def evaluate(argv: list[str]) -> int:
    parser = _parser(
        "eval",
        "Ask multiple-choice questions from local files and score the options by their\n"
        "likelihood: accuracy with a 95 % interval, and which option was chosen how often.",
        data="questions: BLINK's form (question, image_1, ..., answer) or LLaVA's",
    )
    _with_masks(parser)
    parser.add_argument("--baseline", default="", help="another checkpoint, compared pair by pair")
    parser.add_argument("--limit", type=_count, default=0, help="questions (default: all)")
    parser.add_argument("--output", type=Path, help="answers as JSON lines")
    args = parser.parse_args(argv)
    from rwkvtune.evaluation.alternating import (
        Prompts,
        accuracy_of,
        answer,
        confusion,
        paired_difference,
        read_questions,
        write_answers,
    )
    from rwkvtune.inference.alternating import processor_of

    questions = read_questions(args.data_path, image_folder=args.image_folder)
    questions = questions[: args.limit or None]

    def asked(name: str, own: argparse.Namespace) -> list[Any]:
        model, tokenizer = _loaded(own, name)
        if any(q.pictures for q in questions):
            _needs_tower(model, name)
        prompts = Prompts(tokenizer, processor_of(model.config), args.version)
        return list(answer(model, prompts, questions))

    answers = asked(args.model, args)
    print(f"{len(answers)} questions: accuracy {accuracy_of(answers)}")
    letters = max((a.question.options for a in answers), key=len)
    print("right \\ chosen  " + "  ".join(f"{letter:>4}" for letter in letters))
    for letter, row in zip(letters, confusion(answers), strict=True):
        print(f"{letter:<15} " + "  ".join(f"{count:>4}" for count in row))
    if args.output:
        write_answers(args.output, answers)
        print(f"wrote {args.output}")
    if args.baseline:
        theirs = asked(args.baseline, argparse.Namespace())
        mean, low, high = paired_difference(answers, theirs)
        print(f"baseline: accuracy {accuracy_of(theirs)}")
        print(f"difference: {100 * mean:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f})")
    return 0


def sweep(argv: list[str]) -> int:
    parser = _parser(
        "sweep",
        "Train variants and schedules from the same weights on the same data with the same\n"
        "budget, ask all the same questions, and print a table with 95 % intervals. What follows\n"
        "-- are flags of train_alternating.py. Run again, it goes on where it was stopped.",
        data="LLaVA manifest to train on",
    )
    parser.add_argument("--test_path", required=True, help="questions")
    parser.add_argument("--output", type=Path, required=True, help="a folder, one run in each cell")
    parser.add_argument(
        "--variants",
        default="base,alternating,alternating_cross",
        help="comma list (default: %(default)s)",
    )
    parser.add_argument(
        "--schedules",
        default="alternate_keep_last",
        help="comma list; layers by their numbers are one schedule: first_k:2;1,3;2,4 are three "
        "(default: %(default)s)",
    )
    own, further = _split_at_dashes(argv)
    args = parser.parse_args(own)
    from rwkvtune.cli.alternating_train import parse
    from rwkvtune.evaluation.alternating import read_questions
    from rwkvtune.training.alternating_sweep import cells_of, run_cell, table

    given = ["--model_name_or_path", args.model, "--data_path", args.data_path]
    given += ["--image_folder", args.image_folder, "--version", args.version]
    settings = parse([*given, "--output_dir", str(args.output), *further])
    wrong = settings.problems()
    if wrong:
        raise UserError("; ".join(wrong))
    questions = read_questions(args.test_path)
    results = []
    for cell in cells_of(args.variants.split(","), _schedules(args.schedules)):
        print(f"== {cell.variant}, schedule {cell.schedule}", flush=True)
        result = run_cell(cell, settings, questions, args.output / cell.name, say=print)
        if isinstance(result, int):
            return result
        results.append(result)
    print(table(results))
    return 0


def _schedules(text: str) -> list[str]:
    """Between commas or semicolons; numbers between commas are one list of layers."""
    return re.findall(r"\d+(?:,\d+)*(?=[,;]|$)|[^,;]+", text)


def _split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def export_command(argv: list[str]) -> int:
    parser = _parser("export", "Write a checkpoint in another naming, every tensor bit for bit.")
    _with_masks(parser)
    parser.add_argument("--naming", required=True, choices=("llava", "hf", "qwen2"), help="of it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    from rwkvtune.inference.alternating import Checkpoint, export

    model, _ = _loaded(args, args.model)
    source = Checkpoint.open(args.model).folder
    if args.output.resolve() == source.resolve():
        raise UserError(f"--output {args.output} is the checkpoint itself: name another folder")
    for line in export(model, args.output, args.naming, tokenizer_from=source):
        print(f"left out: {line}", file=sys.stderr)
    print(f"wrote {args.output}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "masks": masks,
    "attention": attention,
    "eval": evaluate,
    "sweep": sweep,
    "export": export_command,
}
