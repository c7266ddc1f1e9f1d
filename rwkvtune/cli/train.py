"""`rwkvtune train`: every field of training/config.py as a flag, or as a key of a YAML file."""

from __future__ import annotations

import os
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from rwkvtune.cli.launcher import for_launcher, told_once
from rwkvtune.configs import load_model_config
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.training.config import (
    TrainConfig,
    expected,
    option_groups,
    setting_types,
    unknown_settings,
)

DESCRIPTION = """Pretrain an RWKV language model, or go on with the run in --proj_dir.

  rwkvtune train --data_file data/text --n_layer 6 --n_embd 512 --proj_dir out/first
  rwkvtune train --config out/first/config.yaml

Settings come from --config and then from flags, which win. The same command goes on with a run
that was stopped."""


class AsWritten(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description, which show commands."""


class OneLineParser(ArgumentParser):
    """Says what is wrong in one line instead of printing all flags."""

    def __init__(
        self, command: str, *, usage: str, about: str, config_class: type[TrainConfig] = TrainConfig
    ) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            prog=command,
            usage=usage,
            description=about,
            formatter_class=AsWritten,
            allow_abbrev=False,
        )
        self.config_class = config_class
        self.types = dict(setting_types(config_class))
        """Of every flag by its name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        one_line = " ".join(str(message).split())
        raise UserError(plain_message(one_line, self.types, self.prog)) from ex


def main(argv: list[str]) -> int:
    return start(TrainConfig.from_flat(parse_settings(make_parser(), argv)))


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        "rwkvtune train",
        usage="rwkvtune train [--config FILE] [--SETTING VALUE ...]",
        about=DESCRIPTION,
    )
    add_settings(parser)
    return parser


def add_settings(parser: OneLineParser) -> None:
    """Flags grouped by the dataclasses of training/config.py, without a prefix."""
    parser.add_argument("--config", action="config", help="YAML file of settings")
    for options in option_groups(parser.config_class).values():
        parser.add_class_arguments(options, None)


def parse_settings(parser: OneLineParser, argv: Sequence[str]) -> dict[str, Any]:
    """Value of every flag by its name; UserError for what cannot be understood.

    What a preset (`model_config`) recommends takes the place of the parser's own defaults.
    """
    args = config_first(with_plain_booleans(argv, parser.types))
    with told_once():
        check_config_files(args)
        values: dict[str, Any] = parser.parse_args(args).as_dict()
        if values["model_config"]:
            recommended = load_model_config(values["model_config"]).recommended()
            parser.set_defaults(recommended)
            values = parser.parse_args(args).as_dict()
            if "lr_init" in recommended:  # ends at a tenth, as our own default does
                parser.set_defaults(lr_final=float(f"{values['lr_init'] / 10:.12g}"))
                values = parser.parse_args(args).as_dict()
    values.pop("config", None)
    return values


def start(
    config: TrainConfig,
    *,
    notes: Sequence[str] = (),
    rows: Sequence[tuple[str, str]] = (),
    is_default_devices: bool = False,
) -> int:
    """Train as `config` says, on the devices that a launcher may have chosen; the exit code."""
    with told_once():
        config = for_launcher(config, os.environ, is_default=is_default_devices)
        from rwkvtune.training.lm import train_language_model  # torch: seconds

        return train_language_model(config, notes=notes, rows=rows).exit_code


def config_first(args: Sequence[str]) -> list[str]:
    """The same arguments with --config before the flags: the parser lets the later one win."""
    first: list[str] = []
    rest: list[str] = []
    for i, arg in enumerate(args):
        is_config = arg == "--config" or arg.startswith("--config=")
        is_its_value = i > 0 and args[i - 1] == "--config"
        (first if is_config or is_its_value else rest).append(arg)
    return first + rest


def check_config_files(args: Sequence[str]) -> None:
    """UserError that names the file when one given by --config holds no settings; the parser's own
    messages do not."""
    paths = [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    paths += [value for arg, value in zip(args, args[1:], strict=False) if arg == "--config"]
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingFileError(f"--config {path}: there is no such file") from error
        except OSError as error:
            raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
            raise UserError(f"--config {path}: this is no YAML: {reason}") from error
        if not isinstance(content, dict):
            raise UserError(
                f"--config {path}: expected lines such as `n_layer: 12`, found "
                + ("nothing" if content is None else f"one {type(content).__name__}")
            )


def with_plain_booleans(argv: Iterable[str], types: Mapping[str, Any]) -> list[str]:
    """`--grad_cp 1`, as upstream writes it, and a bare `--grad_cp` mean `--grad_cp true`."""
    booleans = {f"--{name}" for name, hint in types.items() if hint is bool}
    words = {"0": "false", "1": "true"}
    args = [part for arg in argv for part in _split_if_boolean(arg, booleans)]
    result: list[str] = []
    for i, arg in enumerate(args):
        is_value = i > 0 and args[i - 1] in booleans
        result.append(words.get(arg, arg) if is_value else arg)
        if arg in booleans and (i + 1 == len(args) or args[i + 1].startswith("--")):
            result.append("true")
    return result


def _split_if_boolean(arg: str, booleans: set[str]) -> list[str]:
    """`--grad_cp=1` in two parts."""
    name, equals, value = arg.partition("=")
    return [name, value] if equals and name in booleans else [arg]


def plain_message(message: str, types: Mapping[str, Any], command: str) -> str:
    """What the parser found wrong, in the words of the flags' own types and names."""
    found = re.search(r'Parser key "(\w+)".*(?:Got value|Given value): (.*)', message)
    if found and found[1] in types:
        return f"{found[1]}={found[2]} must be {expected(types[found[1]])}"
    found = re.search(r"Option '(\w+)' is not accepted", message)
    if found:
        return unknown_settings([found[1]], known=types, command=command)
    found = re.match(r"unrecognized arguments: (.*)", message)
    if found:
        names = [arg[2:].partition("=")[0] for arg in found[1].split() if arg.startswith("--")]
        if names:
            return unknown_settings(names, known=types, command=command)
        return f"{message}; every setting is --NAME VALUE"
    return f"{message} (see {command} --help)"
