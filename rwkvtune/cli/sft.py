"""`rwkvtune sft`: fine-tune on conversations, after looking at what will be trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rwkvtune.cli import output
from rwkvtune.cli.generate import UNSAFE_ON_A_TERMINAL
from rwkvtune.cli.launcher import for_launcher, told_once
from rwkvtune.cli.train import OneLineParser, add_settings, parse_settings
from rwkvtune.errors import UserError
from rwkvtune.training.sft_config import SFTConfig

if TYPE_CHECKING:
    from rwkvtune.data.chat_samples import ChatSamples
    from rwkvtune.data.tokenizers import Tokenizer

ABOUT = """Fine-tune an RWKV language model on conversations, or go on with the run in --proj_dir.

  rwkvtune sft --preview 3 --data_file chats.jsonl
  rwkvtune sft --data_file chats.jsonl --load_model rwkv7-g1-0.1b.pth --proj_dir out/tuned
  rwkvtune chat out/tuned

Each line of the file is {"messages": [{"role": "user", "content": ...}, ...]}, ShareGPT's
{"conversations": ...}, a pair such as {"instruction": ..., "output": ...}, or {"text": ...}.
--preview N shows N of them with what is trained in colour (in [[ ]] where the output is no
terminal) and stops; it needs no weights. Settings come from --config and then from flags."""

COLOUR, PLAIN = "\x1b[1;32m", "\x1b[0m"


def main(argv: list[str]) -> int:
    values = parse_settings(make_parser(), argv)
    preview: int = values.pop("preview")
    config = SFTConfig.from_flat(values)
    if preview < 0:
        raise UserError(f"--preview is {preview}: give how many conversations to show")
    if preview:
        return show(config, preview)
    with told_once():
        config = for_launcher(config, os.environ)
        from rwkvtune.training.sft import fine_tune  # torch: seconds

        return fine_tune(config).exit_code


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        "rwkvtune sft",
        usage="rwkvtune sft [--preview N] [--config FILE] [--SETTING VALUE ...]",
        about=ABOUT,
        config_class=SFTConfig,
    )
    parser.add_argument(
        "--preview", type=int, default=0, help="show so many conversations as they are trained"
    )
    parser.types["preview"] = int
    add_settings(parser)
    return parser


def show(config: SFTConfig, count: int) -> int:
    """Print the first conversations with their mask, and what there is in all."""
    problems = config.problems()
    if problems:
        raise UserError("; ".join(problems))
    from rwkvtune.training.sft_data import samples_to_look_at

    notes: list[str] = []
    samples, tokenizer = samples_to_look_at(config, notes)
    is_coloured = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    marks = (COLOUR, PLAIN) if is_coloured else ("[[", "]]")
    for number in range(min(count, len(samples))):
        ids, trained = samples[number]
        output.write(
            f"--- {samples.places[number]}: {len(ids)} tokens, {int(trained.sum())} trained\n"
            + "".join(marked(samples, number, tokenizer, marks))
            + "\n"
        )
    output.write("".join(f"{line}\n" for line in (*notes, f"in all: {samples.in_words()}")))
    return 0


def marked(
    samples: ChatSamples, number: int, tokenizer: Tokenizer, marks: tuple[str, str]
) -> Iterator[str]:
    """The text of a sample with marks around what is trained; `<end>` for END_OF_DOCUMENT."""
    from rwkvtune.data.tokenizers import END_OF_DOCUMENT

    ids, trained = (part.tolist() for part in samples[number])
    for is_trained, run in groupby(range(len(ids)), key=trained.__getitem__):
        text = "".join(
            "<end>" * len(same) if is_end else tokenizer.decode(same)
            for is_end, same in (
                (is_end, list(group))
                for is_end, group in groupby((ids[i] for i in run), key=END_OF_DOCUMENT.__eq__)
            )
        ).translate(UNSAFE_ON_A_TERMINAL)
        yield f"{marks[0]}{text}{marks[1]}" if is_trained else text
