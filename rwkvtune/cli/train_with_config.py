"""What examples/train_with_config.sh runs: a preset's weights trained on the user's data, or, when
neither is given, the same path tried on a tiny random model."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from datetime import datetime
from pathlib import Path

from rwkvtune.cli.train import make_parser, parse_settings
from rwkvtune.cli.weights import header_of
from rwkvtune.configs import ModelConfig, load_model_config
from rwkvtune.configs.comparison import preset_for
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write
from rwkvtune.training.config import TrainConfig

USAGE = """usage: bash examples/train_with_config.sh SIZE [--FLAG VALUE ...]

Train a model by its preset. SIZE: 0.1b, 0.4b, 1.5b, 2.9b, 7.2b, 13.3b, or the JSON file of a
preset. Flags are those of `rwkvtune train`.

  DATA=...      text (.txt, .jsonl, .parquet, a folder) or the prefix of token files
  WEIGHTS=...   weights to train; without it the preset's own are looked for

With neither, a tiny random model is trained on bundled text, so that the path can be tried."""

FIRST_LINE_OF_A_TRYOUT = "NO WEIGHTS GIVEN: trying the path on a tiny random model"
TRYOUT_SIZES = {"n_layer": 2, "n_embd": 64, "decay_rank": 32, "a_rank": 32, "v_rank": 32}
TRYOUT_TRAINING = {"ctx_len": 64, "micro_bsz": 2, "lr_init": 3e-3}
TRYOUT_TOKENS = 20 * 2 * 64
TRYOUT_CHARACTERS = 20_000


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"the size comes first, found {argv[0]}: train_with_config.sh 0.1b ...")
    preset, flags = load_model_config(argv[0]), argv[1:]
    size = _size_of(preset)
    parser = make_parser()
    environment = {"data_file": "DATA", "load_model": "WEIGHTS"}
    parser.set_defaults({name: os.environ.get(key, "") for name, key in environment.items()})
    parser.set_defaults(proj_dir=f"output_{size}_{_now()}")
    config = TrainConfig.from_flat(parse_settings(parser, [*flags, "--model_config", argv[0]]))
    wrong = [problem for problem in config.problems() if not problem.startswith("data_file")]
    if wrong:
        raise UserError("; ".join(wrong))
    data, weights = config.data.data_file, config.model.load_model
    folder = Path(config.output.proj_dir)
    if not data and not weights:
        parser.set_defaults(proj_dir=f"output_{size}_tryout_{_now()}")
        folder = Path(parse_settings(parser, flags)["proj_dir"])
        return _try_out(preset, folder, flags)
    if not data:
        raise UserError(
            f"WEIGHTS={weights}, but no data: give DATA=... (text or the prefix of token files)"
        )
    found = preset.find_weights(weights or None)
    _check_fits(preset, found)
    prefix = _token_files(data, folder, preset)
    return _become_training(
        [*flags, "--model_config", argv[0], "--load_model", str(found), "--data_file", prefix],
        folder,
    )


def _check_fits(preset: ModelConfig, weights: Path) -> None:
    """Before the user's text is tokenized; training would say it after."""
    shapes = {name: info.shape for name, info in header_of(weights).tensors.items()}
    from rwkvtune.training.starting_point import check_preset

    check_preset(preset, shapes, weights)


def _try_out(preset: ModelConfig, folder: Path, flags: list[str]) -> int:
    print(FIRST_LINE_OF_A_TRYOUT, flush=True)
    _make_folder(folder)
    json_file = _write_tiny_model(folder, preset)
    print(
        f"a random {json_file.stem} instead of {preset.shown_as}; for the real one: DATA=my.txt "
        "WEIGHTS=FILE (or the preset's own, see rwkvtune configs show)",
        flush=True,
    )
    from rwkvtune.demo.run import TEXT

    text = folder / "data" / "text.txt"
    sample = TEXT.read_text(encoding="utf-8")[:TRYOUT_CHARACTERS]
    atomic_write(text, lambda file: file.write(sample.encode()))
    prefix = _token_files(str(text), folder, load_model_config(str(json_file)))
    length = ["--exit_tokens", str(TRYOUT_TOKENS), "--log_every", "5"]
    return _become_training(
        [*length, *flags, "--model_config", str(json_file), "--data_file", prefix], folder
    )


def _write_tiny_model(folder: Path, preset: ModelConfig) -> Path:
    """A tiny random model with its own preset beside it, so that both are read as real ones are."""
    from rwkvtune.checkpoint import save_weights
    from rwkvtune.models import RWKV7Config, build_model

    config = RWKV7Config(vocab_size=preset.vocab_size, g_rank=32, **TRYOUT_SIZES)
    weights = folder / "tiny-random.pth"
    save_weights(weights, build_model(config, seed=0).state_dict())
    content = preset_for(
        config, model_file=weights.name, model_name="tiny random model", training=TRYOUT_TRAINING
    )
    path = folder / "rwkv7-tiny-random.json"
    atomic_write(path, lambda file: file.write(json.dumps(content, indent=2).encode()))
    return path


def _token_files(data: str, folder: Path, preset: ModelConfig) -> str:
    """The prefix of token files, or a mixture of them, as given; text becomes token files of the
    World tokenizer in `folder`."""
    if not Path(data).exists():
        first = re.split(r"[:,]", data)[0]
        if any(Path(f"{prefix}.bin").exists() for prefix in (data, first)):
            return data
        raise MissingFileError(
            f"DATA={data}: there is no such file or folder, and no token files {data}.bin and "
            f"{data}.idx either"
        )
    if Path(data).suffix in (".bin", ".idx"):
        return str(Path(data).with_suffix(""))
    from rwkvtune.data.build import build_token_files
    from rwkvtune.data.tokenizers import load_tokenizer

    known = load_tokenizer("world").vocab_size
    if preset.vocab_size < known:
        raise UserError(
            f"preset {preset.shown_as} has vocab_size {preset.vocab_size}, less than the {known} "
            f"ids of the World tokenizer: make token files of {data} with the model's own "
            "(rwkvtune data build --tokenizer ...), and give their prefix as DATA"
        )
    prefix = folder / "data" / "tokens"
    built = build_token_files(data, prefix, "world")
    for note in built.notes:
        print(f"note: {note}")
    print(
        f"{prefix}.bin: {built.train.tokens:,} World tokens of {built.train.documents:,} "
        f"documents in {data}",
        flush=True,
    )
    return str(prefix)


def _become_training(arguments: list[str], folder: Path) -> int:
    """Go on as `rwkvtune train`, whose further processes, one for each GPU, then begin with the
    same command and not with what was prepared here."""
    command = ["train", *arguments, "--proj_dir", str(folder)]
    print(f"rwkvtune {shlex.join(command)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "rwkvtune", *command])


def _size_of(preset: ModelConfig) -> str:
    """0.1b of rwkv7-0.1b, wherever that comes from."""
    stem = Path(preset.identifier).name.removesuffix(".json").lower()
    return stem.partition("-")[2] or stem


def _now() -> str:
    return datetime.now().strftime("%Y%m%d_%H%M%S")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{path} exists: choose another --proj_dir, or wait a second") from None
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}") from error
