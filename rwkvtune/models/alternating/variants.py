"""The variants by name, and which one a config.json describes. No torch: asking is quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rwkvtune.errors import MissingFileError, UserError

Variant = Literal["alternating", "alternating_cross", "base"]


def variant_of(model_type: str | None) -> Variant | None:
    """The variant that a model_type stands for; None for one that is not known."""
    if not model_type:
        return None
    name = model_type.lower()
    if "alternating_cross" in name:
        return "alternating_cross"
    return "alternating" if "alternating_attn" in name else "base"


def variant_of_config(raw: Mapping[str, Any]) -> Variant | None:
    """Of a config.json: from the decoder's model_type, else the whole's."""
    whole: str | None = raw.get("model_type")
    decoder = variant_of((raw.get("text_config") or raw).get("model_type"))
    return decoder if decoder not in (None, "base") else variant_of(whole)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder; UserError where it is missing or damaged."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{folder} is no checkpoint: it has no config.json") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object")
    return raw
