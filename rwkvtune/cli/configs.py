"""`rwkvtune configs`: presets listed, shown, checked, and written from weights."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rwkvtune.cli import check_configs, output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.inspect import settings_to_train_further, weights_facts
from rwkvtune.cli.weights import header_of
from rwkvtune.configs import list_available_models, load_model_config
from rwkvtune.configs.comparison import preset_for
from rwkvtune.configs.model_loader import full_names, model_info
from rwkvtune.configs.weights_file import HUB_REPOSITORY, download
from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write
from rwkvtune.models import RWKV7Config, config_from_shapes
from rwkvtune.weights_header import WeightsHeader

HELP = """usage: rwkvtune configs COMMAND [options]

Presets: what the released models look like, where their weights are, and recommended values.
`rwkvtune train --model_config NAME` uses one.

commands:
  list             the presets that have a name
  show NAME        all that one says, and where its weights are; --download fetches them
  from-checkpoint  a preset with the dimensions of a weights file, as JSON
  check            build each preset's model without memory; compare tensors and counts"""

SHOW_HELP = """Show a preset, and where its weights are.

  rwkvtune configs show 1.5b
  rwkvtune configs show 1.5b --download

NAME is a short name, a full name or the path of a JSON file. Nothing is fetched without
--download."""

FROM_CHECKPOINT_HELP = """Write the preset that fits a weights file. Only names and shapes are read,
so a file of any size takes a moment.

  rwkvtune configs from-checkpoint my.pth                          onto the terminal
  rwkvtune configs from-checkpoint my.pth --output rwkv7-my.json

The context length is that of the file's name (ctx4096), if it has one: weights do not tell it."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        output.write(HELP + "\n")
        return 0 if argv else 2
    commands: dict[str, Callable[[list[str]], int]] = {
        "list": _list,
        "show": _show,
        "from-checkpoint": _from_checkpoint,
        "check": check_configs.main,
    }
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        raise UserError(f"unknown command configs {argv[0]}: {hint}")
    return commands[argv[0]](argv[1:])


def _list(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune configs list", "List the presets that have a name.")
    parser.add_argument("--dir", metavar="FOLDER", help="those of a folder instead")
    folder = parser.parse_args(argv).dir
    presets = list_available_models(folder)
    rows = [("name", "layers", "width", "parameters", "model", "file")]
    wrong = []
    for name in full_names(presets):
        try:
            preset = load_model_config(presets[name])
        except UserError as error:
            wrong.append(str(error))
            continue
        d = preset.dimensions
        size = f"{check_configs.parameters_of(d) / 1e9:.3f} B"
        file = presets[name] if preset.config_source.startswith("file:") else "builtin"
        rows.append((name, str(d.n_layer), str(d.n_embd), size, preset.model_name, file))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        output.write("  ".join([*cells, row[5]]).rstrip() + "\n")
    for message in wrong:
        print(f"left out: {message}", file=sys.stderr)
    return 2 if wrong else 0


def _show(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune configs show", SHOW_HELP)
    parser.add_argument("name", metavar="NAME", help="1.5b, rwkv7-1.5b or a JSON file")
    parser.add_argument(
        "--download", action="store_true", help="fetch the weights into the Hugging Face cache"
    )
    parser.add_argument(
        "--repo",
        default="",
        metavar="OWNER/NAME",
        help=f"the hub's repository to fetch from (default {HUB_REPOSITORY})",
    )
    args = parser.parse_args(argv)
    preset = load_model_config(args.name)
    if args.repo and not args.download:
        raise UserError("--repo says where to fetch from: give --download too")
    if args.download:
        if preset.model_file is None:
            raise UserError(f"preset {preset.shown_as} names no model_file to fetch")
        print(f"fetched {download(preset.model_file, repository=args.repo or HUB_REPOSITORY)}")
    output.write(model_info(preset) + "\n")
    return 0


def _from_checkpoint(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune configs from-checkpoint", FROM_CHECKPOINT_HELP)
    parser.add_argument("file", type=Path, metavar="FILE", help="a .pth or .safetensors file")
    parser.add_argument("--output", type=Path, metavar="JSON", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    args = parser.parse_args(argv)
    target: Path | None = args.output
    if target is not None and target.suffix != ".json":
        raise UserError(f"--output {target}: a preset's name ends in .json")
    if target is not None and target.exists() and not args.overwrite:
        raise UserError(f"{target} exists: give --overwrite to replace it, or another --output")
    text = json.dumps(preset_of_file(args.file, header_of(args.file)), indent=2) + "\n"
    if target is None:
        output.write(text)
        return 0
    atomic_write(target, lambda file: file.write(text.encode()))
    print(f"wrote {target}; train with it: rwkvtune train --model_config {target} ...")
    if target.absolute().parent != args.file.absolute().parent:
        print(
            f"note: {args.file.name} is not looked for in {args.file.absolute().parent}, unless "
            "RWKVTUNE_MODELS names that folder, you give --load_model, or the JSON lies there",
            file=sys.stderr,
        )
    return 0


def preset_of_file(path: Path, header: WeightsHeader) -> dict[str, object]:
    """The preset of a weights file; UserError for weights that are not RWKV-7, or not whole."""
    facts = weights_facts(path, header, ctx_len=None)
    if facts["version"] != "x070":
        raise UserError(
            f"{path} holds {facts['name']} {facts['version']}, and presets are for RWKV-7 x070: "
            "train it without one, its dimensions are read from the file"
        )
    if facts["odd"]:
        raise UserError(f"{path} is no whole RWKV-7: {'; '.join(facts['odd'])}")
    config = config_from_shapes({name: info.shape for name, info in header.tensors.items()})
    assert isinstance(config, RWKV7Config)
    fitting = facts["presets"]
    training = (
        load_model_config(fitting[0]).recommended()
        if fitting
        else settings_to_train_further(path, facts["parameters"], None)
    )
    return preset_for(config, model_file=path.name, model_name=path.stem, training=training)
