"""Presets by name: which there are, loading one, and showing it."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkvtune.configs.preset import ARCHITECTURE, BUILTIN_FOLDER, ModelConfig
from rwkvtune.configs.weights_file import FOLDERS_VARIABLE, look_for, model_folders
from rwkvtune.errors import MissingFileError, UserError

__all__ = ["ModelConfig", "list_available_models", "load_model_config", "print_model_info"]


def load_model_config(
    config_identifier: str | os.PathLike[str],
    config_dir: str | None = None,
    default_arch: str = ARCHITECTURE,
) -> ModelConfig:
    """A preset by its short name (1.5b), its full name (rwkv7-1.5b) or the path of a JSON file.

    Names are those of `list_available_models(config_dir)`, in upper or lower case; a preset's
    `model_name` is taken too. A short name means the preset of `default_arch` where several have
    it. Identifiers with a `/` or `.json` at the end are paths. MissingFileError for what there is
    not, UserError for a file that is no preset.
    """
    if not isinstance(config_identifier, str | os.PathLike):
        raise UserError(
            f"{config_identifier!r} names no preset: give text such as '1.5b', or the path of a "
            "JSON file"
        )
    presets = list_available_models(config_dir)
    path = _path_of(os.fspath(config_identifier), presets, default_arch)
    return ModelConfig(_read_json(path), _source_of(path))


def list_available_models(config_dir: str | None = None) -> dict[str, str]:
    """Name -> path of its JSON file; each preset under its short name and its full one.

    config_dir: a folder of presets to list instead of those that come with rwkvtune and of files
    such as rwkv7-mine.json in the folders that RWKVTUNE_MODELS names, which win over the former.
    """
    found: dict[str, str] = {}
    # The last one gets a short name that several have.
    paths = sorted(
        _preset_files(config_dir), key=lambda path: _architecture_of(path) == ARCHITECTURE
    )
    for path in paths:
        full = path.stem.lower()
        found |= {full.partition("-")[2] or full: str(path), full: str(path)}
    return found


def full_names(presets: dict[str, str]) -> list[str]:
    """One name for each preset, of those that `list_available_models` gives."""
    return [name for name, path in presets.items() if Path(path).stem.lower() == name]


def print_model_info(config: ModelConfig) -> None:
    """All that a preset says, and where its weights are, in lines."""
    print(model_info(config))


def model_info(config: ModelConfig) -> str:
    d = config.dimensions
    ranks = f"att {d.decay_rank}, gate {d.g_rank}, mv {d.v_rank}"
    lines = {
        "model": config.model_name,
        "source": config.config_source or "a dictionary",
        "description": config.description,
        "architecture": f"{config.architecture_version}, n_layer {d.n_layer}, n_embd {d.n_embd}, "
        f"n_head {d.num_heads} of {d.head_size}, vocab_size {d.vocab_size}"
        + (f", ctx_len {config.ctx_len}" if config.ctx_len else ""),
        "lora dims": ranks + (f", a {d.a_rank}" if d.a_rank != d.decay_rank else ""),
        "channel mix": f"{d.dim_ffn} wide",
        "recommended": ", ".join(
            f"{name} {value:g}" for name, value in config.recommended().items()
        )
        or "nothing; rwkvtune's own defaults hold",
        "weights": _weights_in_words(config),
    }
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items() if text)


def _weights_in_words(config: ModelConfig) -> str:
    if config.model_file is None:
        return "none named"
    found, looked_at = look_for(config.model_file, beside=config.folder)
    if found is not None:
        return str(found)
    places = "".join(f"\n{'':<16}{place}" for place in looked_at)
    return f"{config.model_file}, which is in none of these places:{places}"


def _architecture_of(path: Path) -> str:
    """As the file's name has it: rwkv7 of rwkv7-1.5b.json."""
    return path.stem.lower().partition("-")[0]


def _preset_files(config_dir: str | None) -> Sequence[Path]:
    """The JSON files of presets; of equal names the last counts."""
    if config_dir is not None:
        folder = Path(config_dir).expanduser()
        if not folder.is_dir():
            raise MissingFileError(f"there is no folder {folder} (config_dir)")
        return _by_size(folder.glob("*.json"))
    own = [
        path
        for folder in reversed(model_folders())
        for path in sorted(folder.glob("*.json"))
        # A folder of weights may hold other JSON too, such as config.json or tokenizer.json.
        if re.fullmatch(r"rwkv\d+-.+", path.stem.lower())
    ]
    return [*_by_size(BUILTIN_FOLDER.glob("*.json")), *own]


def _by_size(paths: Any) -> list[Path]:
    """By the numbers in the names, so that 13.3b comes after 2.9b."""

    def key(path: Path) -> list[tuple[float, str]]:
        parts = re.findall(r"([\d.]*\d)|(\D+)", path.stem)
        return [(float(n) if n.count(".") < 2 and n else 0.0, text) for n, text in parts]

    return sorted(paths, key=key)


def _path_of(identifier: str, presets: dict[str, str], default_arch: str) -> Path:
    name = identifier.strip().lower()
    looks_like_path = "/" in identifier or os.sep in identifier or name.endswith(".json")
    if looks_like_path:
        path = Path(identifier).expanduser()
        if path.is_file():
            return path.absolute()
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the JSON file of a preset in it")
        if path.name != identifier:
            near = _nearest(path.stem.lower(), presets)
            raise MissingFileError(f"there is no preset file {path}{near}")
        name = path.stem.lower()  # rwkv7-1.5b.json, as the documentation names the files
    elif Path(identifier).suffix in (".pth", ".safetensors"):
        raise UserError(
            f"{identifier} is a name of weights; a preset is a JSON file, which `rwkvtune configs "
            f"from-checkpoint {identifier}` writes"
        )
    for key in (f"{default_arch.lower()}-{name}", name):
        if key in presets:
            return Path(presets[key])
    for key in full_names(presets):
        if _model_name(presets[key]).lower() == name:
            return Path(presets[key])
    raise MissingFileError(
        f"there is no preset {identifier!r}{_nearest(name, presets)}. There are "
        f"{', '.join(full_names(presets)) or 'none'}: give one of these names, with or without "
        f"{default_arch}-, or the path of a JSON file. Presets of your own, rwkv7-<name>.json, "
        f"have names too in a folder that {FOLDERS_VARIABLE} lists"
    )


def _nearest(name: str, presets: dict[str, str]) -> str:
    near = difflib.get_close_matches(name, presets, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _model_name(path: str) -> str:
    """Of a file that may be no preset."""
    try:
        return str(_read_json(Path(path)).get("model_name", ""))
    except (UserError, AttributeError):
        return ""


def _source_of(path: Path) -> str:
    if path.parent == BUILTIN_FOLDER:
        return f"builtin:{path.stem}"
    return f"file:{path}"


def _read_json(path: Path) -> Any:
    """The content of a JSON file; UserError with line and column for what is none, or has a key
    twice."""

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path} has the key {twice} twice: leave one out")
        return content

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no JSON file: it is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return json.loads(text, object_pairs_hook=no_key_twice)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: this is no JSON: {error.msg}"
        ) from error
