"""What a weights file of any origin holds, under the published names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvtune.cli.inspect import weights_facts
from rwkvtune.cli.weights import header_of
from rwkvtune.errors import UserError
from rwkvtune.models import detect_version

if TYPE_CHECKING:
    from torch import Tensor

MUST_AGREE = ("vocab_size", "n_embd", "n_layer", "model_type", "head_size_a")


@dataclass
class DetectedModelConfig:
    """What the tensors of a checkpoint tell; ctx_len, which they do not, is the default."""

    n_layer: int
    n_embd: int
    vocab_size: int
    model_type: str
    ctx_len: int = 1024
    head_size_a: int = 64

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect_rwkv_checkpoint(checkpoint_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a weights file holds, from names and shapes alone.

    Keys: checkpoint_path, file_size_mb (2^20 bytes), num_parameters, keys_sample (the first ten
    names), dtypes (type -> parameters) and, for RWKV of any version, detected_config (n_layer,
    n_embd, vocab_size, model_type, ctx_len, head_size_a), widths (all other dimensions) and odd
    (what keeps it from being loaded, a line for each kind of tensors); else detection_error.
    MissingFileError, or UserError for what is no weights file.
    """
    path = Path(checkpoint_path).expanduser()
    header = header_of(path)
    info: dict[str, Any] = {
        "checkpoint_path": str(path),
        "file_size_mb": path.stat().st_size / 2**20,
        "num_parameters": sum(tensor.numel for tensor in header.tensors.values()),
        "keys_sample": list(header.tensors)[:10],
    }
    try:
        facts = weights_facts(path, header, ctx_len=None)
        sizes: dict[str, int] = facts["dimensions"]
        detected = DetectedModelConfig(
            sizes["n_layer"],
            sizes["n_embd"],
            sizes["vocab_size"],
            facts["version"] or facts["name"],
            head_size_a=sizes.get("head_size", 64),
        )
    except (UserError, KeyError) as error:
        return info | {"detection_error": str(error)}
    others = {n: size for n, size in sizes.items() if n != "head_size" and not hasattr(detected, n)}
    ranks = {f"{name}_rank": size for name, size in facts.get("ranks", {}).items()}
    return info | {
        "dtypes": facts["dtypes"],
        "detected_config": detected.to_dict(),
        "widths": others | ranks,
        "odd": facts["odd"],
    }


def detect(checkpoint_path: str | os.PathLike[str]) -> DetectedModelConfig:
    """detected_config; UserError when there is none, or of a version that is not trained, or for
    tensors that are missing or fit no model of these dimensions."""
    info = inspect_rwkv_checkpoint(checkpoint_path)
    if "detected_config" not in info:
        raise UserError(info["detection_error"])
    path = Path(checkpoint_path).expanduser()
    try:
        detect_version(header_of(path).tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    detected = DetectedModelConfig(**info["detected_config"])
    if info["odd"]:
        raise UserError(
            f"{path} does not fit an {detected.model_type} model of its own dimensions: "
            f"{'; '.join(info['odd'])}"
        )
    return detected


def load_checkpoint_for_training(
    checkpoint_path: str | os.PathLike[str], override_config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], DetectedModelConfig]:
    """The weights, and what they tell with some fields overridden."""
    from rwkvtune.checkpoint import load_weights

    detected = detect(checkpoint_path)
    known = detected.to_dict()
    if unknown := [name for name in override_config or {} if name not in known]:
        raise UserError(f"override_config: unknown {', '.join(unknown)}; there are {list(known)}")
    weights = load_weights(Path(checkpoint_path).expanduser())
    return weights, dataclasses.replace(detected, **(override_config or {}))


def validate_checkpoint_compatibility(
    checkpoint_config: DetectedModelConfig | Mapping[str, Any],
    pipeline_config: Mapping[str, Any],
) -> tuple[bool, list[str]]:
    """Whether a pipeline's model settings fit a checkpoint, and a line for each that differs."""
    found = (
        checkpoint_config.to_dict()
        if isinstance(checkpoint_config, DetectedModelConfig)
        else checkpoint_config
    )
    differing = [
        f"{name}: checkpoint {found[name]}, pipeline {pipeline_config[name]}"
        for name in MUST_AGREE
        if name in found and name in pipeline_config and found[name] != pipeline_config[name]
    ]
    return not differing, differing
