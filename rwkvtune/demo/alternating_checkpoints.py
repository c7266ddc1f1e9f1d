"""Tiny checkpoints in the formats of the published ones, so that every documented command of
`train_alternating.py` can be tried in seconds, and nothing is downloaded.

    python examples/make_alternating_checkpoints.py FOLDER
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAMES = {
    "lmms-lab/llava-onevision-qwen2-0.5b-ov": ("base", "llava"),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": ("base", "hf"),
    "path_or_repo_with_alternating_attn": ("alternating", "llava"),
    "path_or_repo_with_alternating_cross_attn": ("alternating_cross", "llava"),
    "qwen2-base-or-local": ("base", "qwen2"),
    "path_or_repo_for_backbone": ("base", "qwen2"),
}
"""Checkpoint -> (variant, naming), by the names that the published commands use."""
TOWER_NAME = "google/siglip-so400m-patch14-384"
MANIFESTS = ("laion_subset.json", "laion_subset_in_llava_format.json")

DECODER: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
LLAVA: dict[str, Any] = {
    "mm_vision_tower": TOWER_NAME,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "one_token",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(2x2)",
}


def link(folder: Path, where: Path) -> None:
    """Give the checkpoints their relative names in another folder too."""
    for name in [*NAMES, TOWER_NAME]:
        place = where / name
        if place.is_symlink() or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        os.symlink((folder / name).resolve(), place)


def make(folder: Path, *, seed: int = 0) -> None:
    """Write all of NAMES, the tower and the manifests with their pictures below `folder`."""
    import torch

    from rwkvtune.inference.alternating import export
    from rwkvtune.models.alternating.build import config_of, empty_model
    from rwkvtune.models.alternating.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    for name, (variant, naming) in NAMES.items():
        is_composed = naming != "qwen2"
        config = config_of(
            {**DECODER, **(LLAVA if is_composed else {})},
            variant,  # type: ignore[arg-type]
            tower=TOWER if is_composed else None,
            tower_name=TOWER_NAME if is_composed else "",
            llava={},
            mask_settings={},
        )
        model = empty_model(config, attention=None, dtype=torch.float32, initial_values=True)
        export(model, folder / name, naming)  # type: ignore[arg-type]
        tokenizer.save_pretrained(folder / name)
        if is_composed:
            _write_tower(model, folder / TOWER_NAME)
    _write_samples(folder)


def _write_tower(model: Any, folder: Path) -> None:
    """A whole SigLIP, with the last layer that LLaVA-OneVision leaves out."""
    from rwkvtune.checkpoint import save_weights

    tensors = {f"vision_model.{n}": t for n, t in model.model.vision_tower.state_dict().items()}
    last = TOWER["num_hidden_layers"] - 1
    for name, tensor in list(tensors.items()):
        if f".layers.{last - 1}." in name:
            tensors[name.replace(f".layers.{last - 1}.", f".layers.{last}.")] = tensor
    save_weights(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(TOWER, indent=2))


def _write_samples(folder: Path) -> None:
    """Twelve pictures of one colour each, of several shapes, and what they show."""
    import PIL.Image

    colours = ("red", "green", "blue", "black", "white", "yellow")
    records: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(12):
        colour = colours[i % len(colours)]
        name = f"images/{i}.png"
        PIL.Image.new("RGB", (60 + 20 * (i % 3), 60 + 15 * (i % 4)), colour).save(folder / name)
        question = {"from": "human", "value": "<image>\nWhich colour is this?"}
        answer = {"from": "gpt", "value": f"It is {colour}."}
        records.append({"id": f"{i}", "image": name, "conversations": [question, answer]})
    for name in MANIFESTS:
        (folder / name).write_text(json.dumps(records, indent=1), encoding="utf-8")
