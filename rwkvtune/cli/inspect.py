"""`rwkvtune inspect`: what a weights file or a run folder holds, without reading the values."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rwkvtune.cli import output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.tensor_table import markdown, tensor_rows
from rwkvtune.cli.weights import header_of, version_of
from rwkvtune.configs.comparison import presets_that_fit
from rwkvtune.errors import UserError
from rwkvtune.models import CONFIGS, ModelConfig, RWKV7Config, config_from_shapes
from rwkvtune.models.dimensions import first_few, misfits
from rwkvtune.models.rwkv7.config import UNUSED
from rwkvtune.training.config import FRESH_VERSION, TrainConfig
from rwkvtune.weights_header import TensorInfo, WeightsHeader, newest_weights

ABOUT = """Tell what a weights file holds: version, dimensions, ranks, types, parameters, and
settings to train it further. Only names and shapes are read, so a file of any size takes a moment.

  rwkvtune inspect RWKV-x070-World-0.1B.pth
  rwkvtune inspect out/first --tensors

FILE may be a run folder: then its newest weights are told, and what else is there."""

FLOATS = ("fp64", "fp32", "fp16", "bf16")


def main(argv: list[str]) -> int:
    parser = OneLineParser("rwkvtune inspect", ABOUT)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a .pth, .safetensors or run folder"
    )
    parser.add_argument(
        "--tensors", action="store_true", help="also the table of all tensors, as Markdown"
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    args = parser.parse_args(argv)
    run = run_facts(args.file) if args.file.is_dir() else None
    path: Path = newest_weights(args.file) if run else args.file
    header = header_of(path)
    facts = weights_facts(path, header, ctx_len=run["settings"].get("ctx_len") if run else None)
    rows = tensor_rows(header.tensors, known_tensors(facts["version"])) if args.tensors else None
    if args.json:
        everything = ({"run": run} if run else {}) | facts
        if rows is not None:
            everything["tensors"] = [
                {"name": row.name, **row.info._asdict(), "comment": row.comment,
                 "initialization": row.initialization}
                for row in rows
            ]  # fmt: skip
        output.write(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
        return 0
    parts = [run_text(run)] if run else []
    parts.append(weights_text(facts))
    if rows is not None:
        legend = getattr(CONFIGS.get(facts["version"]), "INITIAL_VALUE_TERMS", "")
        parts.append(markdown(rows) + (f"\n{textwrap.fill(legend, 100)}\n" if legend else ""))
    output.write("\n".join(parts))
    return 0


def known_tensors(version: str) -> Mapping[str, Any]:
    return CONFIGS[version].TENSORS if version in CONFIGS else {}


def weights_facts(path: Path, header: WeightsHeader, *, ctx_len: int | None) -> dict[str, Any]:
    """All that is told about a weights file, as JSON can hold it; UserError for what is no RWKV.

    ctx_len: of the run that wrote it; None = not known.
    """
    tensors = header.tensors
    shapes = {name: info.shape for name, info in tensors.items()}
    found = version_of(path, header)
    dtypes: dict[str, int] = {}
    for info in tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.numel
    facts: dict[str, Any] = {
        "file": str(path),
        "format": header.format,
        "bytes": path.stat().st_size,
        "version": found.version,
        "name": f'{found.generation} "{found.nickname}"' if found.nickname else found.generation,
        "dimensions": partial_dimensions(shapes),
        "dtypes": dtypes,
        "parameters": sum(dtypes.values()),
        "wrappers": list(header.wrappers),
        "odd": [],
    }
    if found.version not in CONFIGS:
        facts["note"] = f"this version of rwkvtune trains {', '.join(CONFIGS)}, not {found}"
        return facts
    try:
        config = config_from_shapes(shapes)
    except UserError as error:
        facts["odd"] = [str(error)]
        return facts
    sizes = dataclasses.asdict(config)
    ranks = {name: size for name, size in sizes.items() if name.endswith("_rank")}
    others = {name: size for name, size in sizes.items() if name not in ranks}
    facts["dimensions"] = others | {"num_heads": config.num_heads}
    facts["ranks"] = {name.removesuffix("_rank"): size for name, size in ranks.items()}
    if isinstance(config, RWKV7Config):
        facts["presets"] = presets_that_fit(config)
    facts["unused"] = sorted(UNUSED & tensors.keys())
    facts["odd"] = odd_tensors(tensors, CONFIGS[found.version].tensor_shapes(config))
    if not facts["odd"]:
        facts["train_further"] = settings_to_train_further(path, facts["parameters"], ctx_len)
    facts["fresh_model"] = flags_of_a_fresh_model(config)
    return facts


def partial_dimensions(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What any RWKV's tensors tell."""
    numbers = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if m]
    known = {"n_layer": 1 + max(numbers)}
    for name in ("emb.weight", "head.weight"):
        if len(shapes.get(name, ())) == 2:
            return known | {"n_embd": shapes[name][1], "vocab_size": shapes[name][0]}
    return known


def odd_tensors(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What a loader would refuse, a line for each kind of oddity."""
    no_floats = [f"{n} {info.dtype}" for n, info in tensors.items() if info.dtype not in FLOATS]
    odd = misfits({name: info.shape for name, info in tensors.items()}, expected, UNUSED)
    return odd + ([f"not floating-point: {first_few(no_floats)}"] if no_floats else [])


def settings_to_train_further(path: Path, parameters: int, ctx_len: int | None) -> dict[str, Any]:
    """Settings for `rwkvtune train --config` that begin from these weights.

    lr_init is RWKV-LM's advice for fine-tuning. Windows and their number shrink with the model;
    ctx_len is the run's own, or at most what the file's name says.
    """
    billions = parameters / 1e9
    named = re.search(r"ctx(\d+)", path.name)
    limit = int(named[1]) if named and int(named[1]) else 1024
    settings = {
        "load_model": str(path),
        "ctx_len": ctx_len or min(limit, 512 if billions > 5 else 1024),
        "micro_bsz": 8 if billions < 0.3 else 4 if billions < 1 else 2 if billions < 2 else 1,
        "lr_init": 1e-5,
        "lr_final": 1e-6,
    }
    return settings | ({"grad_cp": True} if billions >= 1 else {})


def flags_of_a_fresh_model(config: ModelConfig) -> dict[str, int | str]:
    """What `rwkvtune train` has to be told for another model of this shape."""
    sizes = dataclasses.asdict(config)
    told = ("n_layer", "n_embd", "vocab_size", "head_size")
    defaults = dataclasses.asdict(type(config)(**{name: sizes[name] for name in told}))
    defaults["head_size"] = type(config).head_size
    shape = {name: sizes[name] for name in told[:3]}
    rest = {n: size for n, size in sizes.items() if n not in shape and size != defaults[n]}
    version = {} if config.version == FRESH_VERSION else {"version": config.version}
    return version | shape | rest


def weights_text(facts: Mapping[str, Any]) -> str:
    dimensions, dtypes = facts["dimensions"], facts["dtypes"]
    size, parameters = facts["bytes"], facts["parameters"]
    lines = {
        "file": facts["file"],
        "size": f"{size:,} bytes = {in_short(size)}B, {facts['format']}",
        "version": f"{facts['version']}, {facts['name']}".removeprefix(", "),
        **{n: str(dimensions[n]) for n in ("n_layer", "n_embd", "vocab_size") if n in dimensions},
    }
    if "ranks" in facts:
        times = dimensions["dim_ffn"] / dimensions["n_embd"]
        heads = dimensions["num_heads"]
        lines["head_size"] = f"{dimensions['head_size']} ({heads} head{'s' * (heads > 1)})"
        lines["dim_ffn"] = f"{dimensions['dim_ffn']} ({times:g} x n_embd)"
    if facts.get("ranks"):
        lines["ranks"] = ", ".join(f"{name} {size}" for name, size in facts["ranks"].items())
    if "presets" in facts:
        lines["preset"] = ", ".join(facts["presets"]) or (
            f"none; rwkvtune configs from-checkpoint {facts['file']} writes one"
        )
    lines["dtype"] = ", ".join(
        name if len(dtypes) == 1 else f"{name} ({count:,} parameters)"
        for name, count in dtypes.items()
    )
    lines["parameters"] = f"{parameters:,} = {in_short(parameters).replace('G', 'B')}"
    if facts.get("unused"):
        last_parts = ", ".join(name.rpartition(".")[2] for name in facts["unused"])
        lines["unused"] = f"{last_parts} of block 0, which nothing reads"
    if facts["wrappers"]:
        lines["taken off"] = ", ".join(facts["wrappers"])
    if "note" in facts:
        lines["note"] = facts["note"]
    text = aligned([*lines.items(), *(("odd", what) for what in facts["odd"])])
    if "train_further" in facts:
        text += f"""
To train it further, on token files of your own:

rwkvtune train --config tune.yaml --data_file ... --proj_dir ...

with these lines as tune.yaml:

{yaml_text(facts["train_further"])}
"""
    if "fresh_model" in facts:
        flags = " ".join(f"--{name} {value}" for name, value in facts["fresh_model"].items())
        text += f"""
To train a new one of this shape:

rwkvtune train {flags} --data_file ... --proj_dir ...
"""
    return text


def run_facts(folder: Path) -> dict[str, Any]:
    """What a run folder holds beside the weights: its files and their sizes, the steps of its
    resume states (told by their names), and its settings."""
    steps = [re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("resume/step-*")]
    return {
        "folder": str(folder),
        "files": {
            path.name: path.stat().st_size
            for path in sorted(folder.iterdir())
            if path.is_file() and not path.name.startswith(".")
        },
        "resume_steps": sorted(int(step[1]) for step in steps if step),
        "settings": run_settings(folder / "config.yaml"),
    }


def run_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def run_text(run: Mapping[str, Any]) -> str:
    steps, defaults = run["resume_steps"], TrainConfig().to_flat()
    changed = [f"{n} {value}" for n, value in run["settings"].items() if value != defaults.get(n)]
    lists = {
        "files": ", ".join(f"{name} ({in_short(n)}B)" for name, n in run["files"].items()),
        "resume": f"states at steps {', '.join(map(str, steps))}" if steps else "no states",
        "settings": ", ".join(changed) or "all at their defaults",
    }
    return aligned([("run folder", run["folder"])]) + aligned(lists.items(), width=100)


def aligned(lines: Iterable[tuple[str, str]], *, width: int = 0) -> str:
    """Name and text in two columns; texts over several lines of `width` when it is given."""
    column = " " * 12
    if width:
        lines = [
            (name, textwrap.fill(text, width, initial_indent=column, subsequent_indent=column)[12:])
            for name, text in lines
        ]
    return "".join(f"{name:<12}{text}\n" for name, text in lines)


def yaml_text(settings: Mapping[str, Any]) -> str:
    """JSON's strings and words are YAML's too; of numbers, 1e-05 would be text, but not 1.0e-05."""
    return "\n".join(
        f"{name}: {f'{value:.1e}' if isinstance(value, float) else json.dumps(value)}"
        for name, value in settings.items()
    )


def in_short(n: int) -> str:
    """191084544 -> "0.19 G", 1043136 -> "1.04 M", 950 -> "0.95 k"."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if n >= size / 10:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1e3:.2f} k"
