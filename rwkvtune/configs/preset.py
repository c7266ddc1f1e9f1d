"""One preset: its keys, what may stand under them, and what it says to others."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rwkvtune.configs.weights_file import find_weights_file, look_for
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.models.rwkv7.config import RWKV7Config, SimpleTrainConfig

BUILTIN_FOLDER = Path(__file__).parent / "models"
ARCHITECTURE = "rwkv7"
"""The only architecture that presets describe; x052 and x060 weights tell all by themselves."""

_WORDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text"}
_KEYS: dict[str, tuple[type, bool]] = {
    "model_name": (str, False),
    "model_file": (str, False),
    "description": (str, False),
    "architecture_version": (str, False),
    "architecture.n_layer": (int, True),
    "architecture.n_embd": (int, True),
    "architecture.vocab_size": (int, True),
    "architecture.head_size_a": (int, True),
    "architecture.ctx_len": (int, False),
    "architecture.dim_ffn": (int, False),
    "lora_dims.dim_att_lora": (int, True),
    "lora_dims.dim_gate_lora": (int, True),
    "lora_dims.dim_mv_lora": (int, True),
    "lora_dims.dim_a_lora": (int, False),
    "training.recommended_ctx_len": (int, False),
    "training.recommended_batch_size": (int, False),
    "training.recommended_lr": (float, False),
}
"""Key -> its type, and whether a preset must have it."""
_SECTIONS = ("architecture", "lora_dims", "training")


class ModelConfig:
    """What a preset says; UserError, all reasons at once, when it is not one.

    config_dict: the content of the JSON file.
    config_source: `builtin:<name>` or `file:<path>`; the folder of the latter, or of the presets
    that come with rwkvtune, is the first place where weights are looked for.
    """

    def __init__(self, config_dict: dict[str, Any], config_source: str = "") -> None:
        problems = _problems(config_dict)
        if problems:
            raise UserError(
                f"{config_source or 'this preset'} is no preset: {'; '.join(problems)}. The keys "
                f"are {_known_keys()}"
            )
        architecture = config_dict["architecture"]
        training = config_dict.get("training", {})
        self.config_dict = config_dict
        self.config_source = config_source
        self.architecture_version: str = config_dict.get("architecture_version", ARCHITECTURE)
        self.model_name: str = config_dict.get("model_name", "Unknown")
        self.description: str = config_dict.get("description", "")
        self.model_file: str | None = config_dict.get("model_file")
        self.n_layer: int = architecture["n_layer"]
        self.n_embd: int = architecture["n_embd"]
        self.vocab_size: int = architecture["vocab_size"]
        self.head_size_a: int = architecture["head_size_a"]
        self.ctx_len: int | None = architecture.get("ctx_len")
        """What the weights were trained for; None where the preset does not say."""
        self.dim_att_lora: int = config_dict["lora_dims"]["dim_att_lora"]
        self.dim_gate_lora: int = config_dict["lora_dims"]["dim_gate_lora"]
        self.dim_mv_lora: int = config_dict["lora_dims"]["dim_mv_lora"]
        self.recommended_ctx_len: int | None = training.get("recommended_ctx_len")
        self.recommended_batch_size: int | None = training.get("recommended_batch_size")
        """Rows per device and micro-batch."""
        self.recommended_lr: float | None = training.get("recommended_lr")
        said = architecture | config_dict["lora_dims"]
        sizes = {f.name: said[f.name] for f in fields(SimpleTrainConfig) if said.get(f.name)}
        try:
            self.dimensions: RWKV7Config = SimpleTrainConfig(**sizes).model_config()
        except UserError as error:
            raise UserError(f"{config_source or 'this preset'}: {error}") from None

    def __repr__(self) -> str:
        return (
            f"ModelConfig(name={self.model_name!r}, arch={self.architecture_version!r}, "
            f"n_layer={self.n_layer}, n_embd={self.n_embd})"
        )

    @property
    def shown_as(self) -> str:
        """Name and origin, for messages."""
        return f"{self.model_name} ({self.config_source or 'from a dictionary'})"

    @property
    def identifier(self) -> str:
        """What `load_model_config` takes for this preset."""
        return self.config_source.partition(":")[2] or self.model_name

    @property
    def folder(self) -> Path | None:
        """Of the JSON file; None when there is none."""
        kind, _, place = self.config_source.partition(":")
        return BUILTIN_FOLDER if kind == "builtin" else Path(place).parent if place else None

    @property
    def model_path(self) -> str | None:
        """Where the weights were found, else `model_file` as it is (`find_weights` is an error
        then). None without `model_file`."""
        if self.model_file is None:
            return None
        found, _ = look_for(self.model_file, beside=self.folder)
        return self.model_file if found is None else str(found)

    def find_weights(self, explicit: str | Path | None = None) -> Path:
        """The weights: those at `explicit`, else `model_file` beside the JSON, in the current
        folder, in a folder of RWKVTUNE_MODELS, or in the Hugging Face cache.

        MissingFileError names all the places when they are in none.
        """
        if explicit is not None:
            path = Path(explicit).expanduser()
            if not path.is_file():
                raise MissingFileError(f"there is no file {path}")
            return path
        if self.model_file is None:
            raise MissingFileError(
                f"preset {self.shown_as} names no model_file: give weights (--load_model FILE)"
            )
        return find_weights_file(self.model_file, beside=self.folder, preset=self.identifier)

    def to_train_config_dict(self) -> dict[str, int]:
        """The dimensions by their published names, as SimpleTrainConfig takes them."""
        return {
            n: n_of for n, n_of in asdict(SimpleTrainConfig.of(self.dimensions)).items() if n_of
        }

    def recommended(self) -> dict[str, float]:
        """Settings of `rwkvtune train` that the preset has an advice for."""
        advice = {
            "ctx_len": self.recommended_ctx_len,
            "micro_bsz": self.recommended_batch_size,
            "lr_init": self.recommended_lr,
        }
        return {name: value for name, value in advice.items() if value is not None}


def _problems(content: object) -> list[str]:
    """All that is wrong with the content of a preset, but for dimensions that exclude each
    other."""
    if not isinstance(content, dict):
        return [f"expected an object with the key architecture, found {_type_name(content)}"]
    version = content.get("architecture_version", ARCHITECTURE)
    if isinstance(version, str) and version != ARCHITECTURE:
        return [
            f"architecture_version is {version!r}, and presets are for {ARCHITECTURE}; train "
            "weights of another version without a preset: their dimensions are read from the file"
        ]
    flat, found = _flattened(content)
    for key in flat:
        if key not in _KEYS:
            found.append(f"unknown key {key}{_suggestion(key)}")
    found += [f"{key} is missing" for key, (_, must) in _KEYS.items() if must and key not in flat]
    for key, value in flat.items():
        if key in _KEYS:
            found += _wrong_value(key, value)
    return found


def _flattened(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`architecture.n_layer` and so on -> value; and sections that are none."""
    flat: dict[str, Any] = {}
    found: list[str] = []
    for key, value in content.items():
        if key not in _SECTIONS:
            flat[key] = value
        elif isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            found.append(f"{key} must be an object with keys of its own, not {_type_name(value)}")
    return flat, found


def _suggestion(key: str) -> str:
    """The nearest known key, by the whole name or by its last part."""
    by_last_part = {known.rpartition(".")[2]: known for known in _KEYS}
    last = key.rpartition(".")[2]
    if last in by_last_part:
        return f" (it belongs in {by_last_part[last].rpartition('.')[0] or 'the outer object'})"
    near = difflib.get_close_matches(last, [*by_last_part, *_SECTIONS], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _wrong_value(key: str, value: object) -> list[str]:
    kind, must = _KEYS[key]
    if value is None and not must:
        return []
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        return [f"{key} must be {_WORDS[kind]}, not {_type_name(value)} {value!r}"]
    if isinstance(value, int | float) and not 0 < value < math.inf:
        return [f"{key} must be greater than 0, not {value}"]
    if kind is float and isinstance(value, int | float) and value >= 1:
        return [f"{key} must be below 1, not {value}"]
    if key == "model_file" and not value:
        return ["model_file must be a file name, or null for none"]
    return []


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _known_keys() -> str:
    """`model_name, ..., architecture {n_layer, ...}, ...`."""
    names = [key for key in _KEYS if "." not in key]
    for section in _SECTIONS:
        inner = [key.partition(".")[2] for key in _KEYS if key.startswith(f"{section}.")]
        names.append(f"{section} {{{', '.join(inner)}}}")
    return ", ".join(names)
