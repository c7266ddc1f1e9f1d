"""Names of the same tensors in three kinds of checkpoint, and in memory.

| kind  | embeddings                                | projector                            |
| ----- | ----------------------------------------- | ------------------------------------ |
| llava | model.embed_tokens.weight                 | model.mm_projector.0.weight          |
| hf    | language_model.model.embed_tokens.weight  | multi_modal_projector.linear_1.weight |
| qwen2 | model.embed_tokens.weight                 | (a language model alone)             |
| memory | model.language_model.embed_tokens.weight | model.multi_modal_projector.linear_1.weight |

"hf" also reads what transformers 5 writes. Adapters of peft and mm_projector.bin are read by the
same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Naming = Literal["llava", "hf", "qwen2"]
NAMINGS: tuple[Naming, ...] = ("llava", "hf", "qwen2")
Group = Literal["lm", "projector", "vision", "newline", "resampler", "other"]

_READ: dict[Naming, tuple[tuple[str, str], ...]] = {
    "llava": (
        (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
        (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    ),
    "hf": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?language_model\.(model\.)?", "model.language_model."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^(model\.)?image_newline$", "model.image_newline"),
    ),
    "qwen2": ((r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),),
}
_WRITE: dict[Naming, tuple[tuple[str, str], ...]] = {
    "llava": (
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^model\.language_model\.", "model."),
    ),
    "hf": (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.(multi_modal_projector\.|image_newline$)", r"\1"),
    ),
    "qwen2": ((r"^model\.language_model\.", "model."),),
}


def detect_naming(names: Iterable[str]) -> Naming:
    """The kind of checkpoint that tensors of these names come from."""
    names = list(names)
    if any("mm_projector." in n or n.startswith("model.vision_tower.vision_tower.") for n in names):
        return "llava"
    marks = ("language_model.", "multi_modal_projector.", "model.language_model.")
    return "hf" if any(name.startswith(marks) for name in names) else "qwen2"


def to_memory(name: str, naming: Naming) -> str:
    """The name in a composed model; a name that no rule fits stays."""
    name = name.removeprefix("base_model.model.")  # peft
    if name.startswith("mm_projector."):  # some adapter files
        name = f"model.{name}"
    return _first_that_fits(name, _READ[naming])


def from_memory(name: str, naming: Naming) -> str:
    """The name in a checkpoint of that kind, of a tensor of a composed model."""
    return _first_that_fits(name, _WRITE[naming])


def _first_that_fits(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name


def group_of(name: str) -> Group:
    """The part of the model that a tensor (its name in memory) belongs to."""
    if name.startswith(("model.language_model.", "lm_head.")):
        return "lm"
    for prefix, group in _GROUPS.items():
        if name.startswith(prefix):
            return group
    return "other"


_GROUPS: dict[str, Group] = {
    "model.multi_modal_projector.": "projector",
    "model.mm_projector.": "projector",
    "model.vision_tower.": "vision",
    "model.image_newline": "newline",
    "model.vision_resampler.": "resampler",
}
