"""A preset beside what a checkpoint really holds: where they differ, and the preset that fits."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from rwkvtune.configs.model_loader import full_names, list_available_models, load_model_config
from rwkvtune.configs.preset import ARCHITECTURE, ModelConfig
from rwkvtune.errors import UserError
from rwkvtune.models.rwkv7.config import RWKV7Config, SimpleTrainConfig

_LORA_DIMS = ("dim_att_lora", "dim_gate_lora", "dim_mv_lora", "dim_a_lora")


def differences(preset: ModelConfig, found: RWKV7Config) -> list[tuple[str, int, int]]:
    """(name as presets have it, the preset's value, the checkpoint's) for each dimension that
    differs."""
    pair = preset.dimensions, found
    written = [asdict(SimpleTrainConfig.of(model)) for model in pair]
    said, real = (
        sizes | {"dim_a_lora": model.a_rank, "dim_ffn": model.dim_ffn}
        for sizes, model in zip(written, pair, strict=True)
    )
    # By what is written: a channel mix that follows n_embd in both is no difference of its own.
    return [(name, said[name], real[name]) for name in said if written[0][name] != written[1][name]]


def disagreement(preset: ModelConfig, found: RWKV7Config, weights: str) -> str:
    """The message about weights that a preset does not fit: a table, and the preset corrected.
    Empty when they agree.

    weights: path of the file.
    """
    rows = differences(preset, found)
    if not rows:
        return ""
    width = max(len(name) for name, _, _ in rows)
    table = [f"  {'':<{width}}  {'preset':>7}  {'file':>7}"]
    table += [f"  {name:<{width}}  {said:>7}  {real:>7}" for name, said, real in rows]
    file_name = PurePath(weights).name
    corrected = preset.config_dict | {"model_file": file_name}
    corrected |= sections_of(found, ctx_len=ctx_len_of(file_name) or preset.ctx_len)
    fitting = presets_that_fit(found)
    lines = [
        f"preset {preset.shown_as} and {weights} disagree about {len(rows)} "
        f"dimension{'s' * (len(rows) > 1)}:",
        *table,
        "The file decides: give other weights, or "
        + (f"--model_config {fitting[0]}, which fits these" if fitting else "no preset")
        + ". Corrected, as a JSON of your own:",
        json.dumps(corrected, indent=2),
    ]
    return "\n".join(lines)


def presets_that_fit(found: RWKV7Config) -> list[str]:
    """Full names of the presets with exactly these dimensions; files that are no presets are
    passed over."""
    fitting = []
    for name in full_names(list_available_models()):
        try:
            preset = load_model_config(name)
        except UserError:
            continue
        if not differences(preset, found):
            fitting.append(name)
    return fitting


def sections_of(found: RWKV7Config, *, ctx_len: int | None) -> dict[str, dict[str, int]]:
    """`architecture` and `lora_dims` of a preset for such a model."""
    sizes = {name: size for name, size in asdict(SimpleTrainConfig.of(found)).items() if size}
    ranks = {name: sizes.pop(name) for name in _LORA_DIMS if name in sizes}
    return {
        "architecture": sizes | ({"ctx_len": ctx_len} if ctx_len else {}),
        "lora_dims": ranks,
    }


def preset_for(
    found: RWKV7Config, *, model_file: str, model_name: str, training: dict[str, float]
) -> dict[str, Any]:
    """A whole preset for a checkpoint, as its JSON holds it.

    training: `ctx_len`, `micro_bsz` and `lr_init` to recommend.
    """
    names = {
        "recommended_ctx_len": "ctx_len",
        "recommended_batch_size": "micro_bsz",
        "recommended_lr": "lr_init",
    }
    return {
        "model_name": model_name,
        "model_file": model_file,
        "description": f"dimensions read from {model_file}",
        "architecture_version": ARCHITECTURE,
        **sections_of(found, ctx_len=ctx_len_of(model_file)),
        "training": {key: training[name] for key, name in names.items() if name in training},
    }


def ctx_len_of(file_name: str) -> int | None:
    """What released files say in their names, as in rwkv7-g1-0.1b-20250307-ctx4096.pth."""
    named = re.search(r"ctx([1-9]\d*)", file_name.rpartition("/")[2])
    return int(named[1]) if named else None
