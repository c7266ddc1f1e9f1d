"""`rwkvtune train`: every field of training/config.py as a flag, or as a key of a YAML file."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from rwkvtune.errors import UserError
from rwkvtune.training.config import OPTION_GROUPS, TrainConfig

DESCRIPTION = """Pretrain an RWKV-7 language model, or go on with the run in --proj_dir.

  rwkvtune train --data_file data/text --n_layer 6 --n_embd 512 --proj_dir out/first
  rwkvtune train --config out/first/config.yaml

Settings come from --config and then from flags, which win. The same command goes on with a run that was stopped."""


class OneLineParser(ArgumentParser):
    """Says what is wrong in one line instead of printing all flags."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(str(message).split()) + " (see rwkvtune train --help)") from ex


def main(argv: list[str]) -> int:
    parser = make_parser()
    namespace = parser.parse_args(with_plain_booleans(argv))
    config = config_from(namespace)
    from rwkvtune.training.lm import train_language_model  # torch: seconds

    return train_language_model(config).exit_code


def make_parser() -> ArgumentParser:
    """Flags grouped by the dataclasses of training/config.py, without a prefix."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = OneLineParser(prog="rwkvtune train", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings")
    for options in OPTION_GROUPS.values():
        parser.add_class_arguments(options, None)
    return parser


def config_from(namespace: Namespace) -> TrainConfig:
    values: dict[str, Any] = namespace.as_dict()
    values.pop("config", None)
    return TrainConfig.from_flat(values)


def with_plain_booleans(argv: list[str]) -> list[str]:
    """`--grad_cp 1`, as upstream writes it, and a bare `--grad_cp` mean `--grad_cp true`."""
    booleans = {
        f"--{f.name}"
        for options in OPTION_GROUPS.values()
        for f in dataclasses.fields(options)
        if get_type_hints(options)[f.name] is bool
    }
    result: list[str] = []
    for i, arg in enumerate(argv):
        if i and argv[i - 1] in booleans and arg in ("0", "1"):
            arg = {"0": "false", "1": "true"}[arg]
        result.append(arg)
        is_last = i == len(argv) - 1
        if arg in booleans and (is_last or argv[i + 1].startswith("--")):
            result.append("true")
    return result
