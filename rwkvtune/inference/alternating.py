"""Checkpoints of Qwen2, LLaVA-OneVision and their alternating variants: finding, loading in all
three namings, and writing them again.

    checkpoint = Checkpoint.open("lmms-lab/llava-onevision-qwen2-0.5b-ov")
    model, report = load(checkpoint)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.data.llava_dataset import IMAGE_TOKEN_INDEX, DataArguments, LlavaDataset
from rwkvtune.data.llava_images import ImageProcessor
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write, inside
from rwkvtune.models.alternating import config as configs
from rwkvtune.models.alternating.build import (
    composed_class,
    config_of,
    empty_model,
    generation_settings,
)
from rwkvtune.models.alternating.config import PUBLISHED_TOWER
from rwkvtune.models.alternating.hub import repository_folder
from rwkvtune.models.alternating.masks import TEXT, VISUAL
from rwkvtune.models.alternating.naming import (
    Naming,
    detect_naming,
    from_memory,
    group_of,
    to_memory,
)
from rwkvtune.models.alternating.packing import PackingRule
from rwkvtune.models.alternating.tokenizer import load_tokenizer
from rwkvtune.models.alternating.variants import (
    Variant,
    read_config,
    variant_of,
    variant_of_config,
)

FAMILY = ("qwen2", "mistral", "llava_qwen", "llava_onevision")
"""Beginnings of the model types whose weights fit."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights."""

    folder: Path
    raw: dict[str, Any]
    """config.json."""

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        beside: Path | None = None,
        allow_download: bool = False,
        config_only: bool = False,
    ) -> Checkpoint:
        """A local folder, or one below the folder `beside`, or a repository in the local cache.

        allow_download: fetch what the cache lacks, with config_only no more than config.json.
        UserError when it is nowhere or has no config.json.
        """
        folder = _find_folder(str(name), beside, allow_download, config_only)
        return cls(folder, read_config(folder))

    @property
    def model_type(self) -> str | None:
        return self.raw.get("model_type")

    @property
    def text(self) -> dict[str, Any]:
        """The decoder's part of config.json."""
        found: dict[str, Any] = self.raw.get("text_config") or self.raw
        return found

    @property
    def variant(self) -> Variant | None:
        return variant_of_config(self.raw)

    @property
    def is_composed(self) -> bool:
        """Has it a vision tower?"""
        return "vision_config" in self.raw or bool(self.raw.get("mm_vision_tower"))

    def check_family(self) -> None:
        """UserError for a checkpoint whose weights no alternating decoder can take."""
        kinds = {str(self.model_type), str(self.text.get("model_type", self.model_type))}
        for kind in kinds:
            if not kind.startswith(FAMILY):
                raise UserError(
                    f"{self.folder} is a {kind} model: alternating decoders are Qwen2's "
                    f"(model_type {', '.join(FAMILY)} ...); {_differences(self.text)}"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name in memory and value of each tensor, file by file, memory-mapped."""
        naming: Naming | None = None
        paths = _weight_files(self.folder)
        for path in paths:
            weights = load_weights(path, verify=False)
            if naming is None or naming == "qwen2":
                naming = detect_naming(weights)
            for name, tensor in weights.items():
                yield to_memory(name, naming), tensor

    @property
    def naming(self) -> Naming:
        """As its tensors are named."""
        return _naming_of_files(_weight_files(self.folder))


def _differences(text: Mapping[str, Any]) -> str:
    """What of a foreign decoder Qwen2 has not, for an error message."""
    has = {k: v for k, v in text.items() if k in ("hidden_size", "num_hidden_layers", "vocab_size")}
    lacking = [name for name in DIMENSIONS[:4] if name not in text]
    said = ", ".join(f"{name}={value}" for name, value in has.items())
    return f"it has {said or 'no known dimensions'}" + (f" and lacks {lacking}" if lacking else "")


def _find_folder(name: str, beside: Path | None, allow_download: bool, config_only: bool) -> Path:
    tried = [Path(name)] + ([beside / name] if beside is not None else [])
    for folder in tried:
        if folder.is_dir():
            return folder
    if Path(name).is_absolute() or name.count("/") != 1:
        raise MissingFileError(f"there is no folder {name}")
    found = repository_folder(name, allow_download=allow_download, config_only=config_only)
    if found is None:
        raise MissingFileError(
            f"there is no folder {name}, and no such repository "
            + ("on the hub" if allow_download else "in the local cache (--allow_download)")
        )
    return found


def _weight_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in names if not inside(folder, name).exists())
            if missing:
                raise MissingFileError(f"{index} names {missing[0]}, which is not there")
            return sorted(inside(folder, name) for name in names)
        if (folder / stem).exists():
            return [folder / stem]
    raise MissingFileError(
        f"{folder} has no weights: expected model.safetensors, pytorch_model.bin or their "
        ".index.json"
    )


def _naming_of_files(paths: list[Path]) -> Naming:
    namings = {detect_naming(load_weights(path, verify=False)) for path in paths}
    return "llava" if "llava" in namings else "hf" if "hf" in namings else "qwen2"


@dataclass
class LoadReport:
    """What became of the tensors of a checkpoint, by part of the model (lm, projector, ...)."""

    matched: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """(name, shape in the checkpoint, shape in the model)."""
    missing: list[str] = field(default_factory=list)
    """Tensors of the model that no checkpoint had; they keep their initial values."""
    skipped: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that were left out on purpose."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that the model has no place for."""
    total: int = 0
    """Tensors in the model, a tied head not counted."""

    def counts(self) -> dict[str, dict[str, int]]:
        """group -> {matched, shape-mismatched, missing, skipped, unexpected}."""
        columns = {
            "matched": self.matched,
            "shape-mismatched": [name for name, _, _ in self.mismatched],
            "missing": self.missing,
            "skipped": self.skipped,
            "unexpected": self.unexpected,
        }
        groups = sorted({group_of(name) for names in columns.values() for name in names})
        return {
            group: {
                column: sum(group_of(name) == group for name in names)
                for column, names in columns.items()
            }
            for group in groups
        }


def load(
    checkpoint: Checkpoint,
    *,
    variant: Variant | None = None,
    vision_tower: str = "",
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    llava: Mapping[str, Any] | None = None,
    **mask_settings: Any,
) -> tuple[Any, LoadReport]:
    """The model of a checkpoint, in eval mode, every tensor bit-equal to the file's (in fp32).

    variant: another class than the checkpoint's own; no shape depends on it.
    vision_tower: folder with the config.json of the tower, where the checkpoint does not tell it.
    llava: fields of LLaVA's configuration that win over the checkpoint's.
    mask_settings: mask_schedule, mask_rule, text_only, legacy_decode_rows.
    UserError when a tensor of the model is missing in the checkpoint or has another shape.
    """
    checkpoint.check_family()
    config = make_config(
        checkpoint, variant or checkpoint.variant or "base", vision_tower, llava, mask_settings
    )
    model = empty_model(config, attention=attention, dtype=dtype, initial_values=False)
    report = fill(model, checkpoint)
    _zero_biases_of_mistral(model, checkpoint, report)
    if report.mismatched or report.missing:
        raise UserError(f"{checkpoint.folder} does not fit its class: {problems(report)}")
    return model.eval(), report


def _zero_biases_of_mistral(model: Any, checkpoint: Checkpoint, report: LoadReport) -> None:
    """Mistral is Qwen2 without the biases of q, k and v."""
    if not str(checkpoint.text.get("model_type")).startswith("mistral"):
        return
    places = _places(model)
    biases = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    for name in [n for n in report.missing if n.endswith(biases)]:
        places[name].data.zero_()
        report.missing.remove(name)


def make_config(
    checkpoint: Checkpoint,
    variant: Variant,
    vision_tower: str = "",
    llava: Mapping[str, Any] | None = None,
    mask_settings: Mapping[str, Any] | None = None,
) -> Any:
    """The configuration of a `variant` model with a checkpoint's dimensions."""
    tower_name = vision_tower or str(checkpoint.raw.get("mm_vision_tower") or "")
    tower: dict[str, Any] | None = None
    if tower_name and "vision_config" not in checkpoint.raw:
        try:
            tower = Checkpoint.open(tower_name, beside=checkpoint.folder.parent).raw
        except MissingFileError:
            if vision_tower:
                raise
    return config_of(
        checkpoint.raw,
        variant,
        tower=tower,
        tower_name=tower_name,
        llava=llava or {},
        mask_settings=mask_settings or {},
    )


def from_backbone(
    backbone: Checkpoint,
    variant: Variant,
    *,
    vision_tower: str = "",
    attention: str | None = None,
    llava: Mapping[str, Any] | None = None,
    allow_download: bool = False,
    **mask_settings: Any,
) -> tuple[Any, LoadReport, list[str]]:
    """An alternating model with a language model's weights; (model, report, what was chosen).

    Copied is every tensor whose name and shape agree; those of the backbone's own multimodal parts
    are skipped. With a vision tower (the published one by its published name, where it is found and
    `vision_tower` is empty) the model has one, with its weights; projector and newline keep their
    initial values.
    """
    backbone.check_family()
    notes = []
    tower: Checkpoint | None = None
    beside = backbone.folder.parent
    try:
        tower = Checkpoint.open(
            vision_tower or PUBLISHED_TOWER, beside=beside, allow_download=allow_download
        )
        notes.append(f"vision tower: {tower.folder}")
    except MissingFileError:
        if vision_tower:
            raise
        notes.append(
            f"no vision tower: {PUBLISHED_TOWER} is not here and --vision_tower was not given; "
            "this is a language model alone"
        )
    config = config_of(
        {**backbone.raw, "mm_vision_tower": str(tower.folder) if tower else None},
        variant,
        tower=tower.raw if tower else None,
        tower_name=str(tower.folder) if tower else "",
        llava=llava or {},
        mask_settings=mask_settings,
    )
    model = empty_model(config, attention=attention, dtype=torch.float32, initial_values=True)
    report = fill(model, backbone, only_lm=True)
    _zero_biases_of_mistral(model, backbone, report)
    notes.append(f"copied {len(report.matched)} params from backbone into {variant} model")
    if tower is not None:
        _fill_tower(model, tower, report)
    return model.eval(), report, notes


def into_checkpoint(
    target: Checkpoint, backbone: Checkpoint, variant: Variant, **options: Any
) -> tuple[Any, LoadReport, list[str]]:
    """A `variant` model of the checkpoint `target`, its language model replaced by a backbone's
    where name and shape agree; (model, report, what was chosen). options: as `load`."""
    backbone.check_family()
    model, first = load(target, variant=variant, **options)
    report = fill(model, backbone, only_lm=True)
    notes = [
        f"all but the language model is from {target.folder}",
        f"copied {len(report.matched)} params from backbone into {variant} model",
    ]
    report.matched += [name for name in first.matched if group_of(name) != "lm"]
    _note_missing(model, _places(model), report)
    return model, report, notes


DIMENSIONS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)


def differing_dimensions(model: Any, backbone: Checkpoint) -> str:
    """Where config.json of a backbone and a model's decoder differ, in words; "" if nowhere."""
    text = model.config.get_text_config()
    found = [
        f"{name} is {backbone.text[name]} in the backbone and {getattr(text, name)} here"
        for name in DIMENSIONS
        if name in backbone.text and backbone.text[name] != getattr(text, name)
    ]
    return ", ".join(found)


def _places(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a composed model, tied ones under every name."""
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # A language model alone has the names of qwen2.
        found[name if hasattr(model.model, "language_model") else to_memory(name, "qwen2")] = tensor
    return found


def fill(model: Any, checkpoint: Checkpoint, *, only_lm: bool = False) -> LoadReport:
    """Copy into a model what a checkpoint has under the same name in the same shape.

    only_lm: skip what belongs to no language model.
    """
    places = _places(model)
    report = LoadReport(total=len({tensor.data_ptr() for tensor in places.values()}))
    for name, tensor in checkpoint.tensors():
        group = group_of(name)
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if only_lm and group not in ("lm", "other"):
            report.skipped.append(name)
        elif name not in places:
            unused = group == "resampler" or "vision_tower.head." in name
            (report.skipped if unused else report.unexpected).append(name)
        elif places[name].shape != tensor.shape:
            report.mismatched.append((name, tuple(tensor.shape), tuple(places[name].shape)))
        else:
            places[name].data.copy_(tensor)
            report.matched.append(name)
    _note_missing(model, places, report)
    return report


def _note_missing(model: Any, places: dict[str, Tensor], report: LoadReport) -> None:
    found = {*report.matched, *(name for name, _, _ in report.mismatched)}
    filled = {places[name].data_ptr() for name in report.matched}  # a tied head needs no entry
    report.missing = [
        name
        for name, tensor in places.items()
        if name not in found and tensor.data_ptr() not in filled
    ]


def _fill_tower(model: Any, tower: Checkpoint, report: LoadReport) -> None:
    places = _places(model)
    layers = model.config.vision_config.num_hidden_layers
    for path in _weight_files(tower.folder):
        for name, tensor in load_weights(path, verify=False).items():
            place = "model.vision_tower." + name.removeprefix("vision_model.")
            is_cut = f".layers.{layers}." in place or place.startswith("model.vision_tower.head.")
            if place not in places or places[place].shape != tensor.shape:
                (report.skipped if is_cut else report.unexpected).append(place)
                continue
            places[place].data.copy_(tensor)
            report.matched.append(place)
    _note_missing(model, places, report)


def problems(report: LoadReport) -> str:
    """Missing and mismatched tensors in one line."""
    parts = [
        f"{name} is {list(given)} in the file and {list(wanted)} in the model"
        for name, given, wanted in report.mismatched[:3]
    ]
    if len(report.mismatched) > 3:
        parts.append(f"{len(report.mismatched)} differ in all")
    if report.missing:
        parts.append(
            f"{len(report.missing)} tensors are missing, such as {', '.join(report.missing[:3])}"
        )
    if report.unexpected:
        parts.append(f"{len(report.unexpected)} have no place, such as {report.unexpected[0]}")
    return "; ".join(parts)


def processor_of(config: Any) -> ImageProcessor:
    """Cuts images as a model of this configuration packs them; the published one for a language
    model alone."""
    if not hasattr(config, "vision_config"):
        return ImageProcessor()
    rule = PackingRule.of(config)
    return ImageProcessor(
        view_size=rule.view_size,
        patch_size=config.vision_config.patch_size,
        image_aspect_ratio=getattr(config, "image_aspect_ratio", None)
        or config.vision_aspect_ratio,
        image_grid_pinpoints=[[w, h] for h, w in rule.grid_pinpoints],
        mm_patch_merge_type=rule.merge,
        mm_newline_position=rule.newline,
        mm_spatial_pool_stride=rule.pool_stride,
        mm_spatial_pool_mode=rule.pool_mode,
    )


def sample_modalities(
    checkpoint: Checkpoint,
    data_path: str,
    index: int,
    *,
    image_folder: str = "",
    version: str = "qwen_2",
    variant: Variant | None = None,
    schedule: str = "",
) -> tuple[Any, Tensor]:
    """(configuration of the decoder, modality ids [T]) of one sample, without any weights."""
    checkpoint.check_family()
    masks = {"mask_schedule": schedule} if schedule else {}
    config = make_config(checkpoint, variant or checkpoint.variant or "base", mask_settings=masks)
    arguments = DataArguments(
        data_path=data_path,
        image_folder=image_folder,
        version=version,
        image_processor=processor_of(config),
    )
    dataset = LlavaDataset(load_tokenizer(checkpoint.folder), arguments)
    if not 0 <= index < len(dataset):
        raise UserError(f"{data_path} has {len(dataset)} samples, 0 to {len(dataset) - 1}: {index}")
    item = dataset[index]
    waiting = iter(item["image"])
    ids: list[int] = []
    for token in item["input_ids"].tolist():
        if token != IMAGE_TOKEN_INDEX:
            ids.append(TEXT)
            continue
        views, size, kind = next(waiting)
        processor = dataset.processor
        if kind == "video":
            ids += [VISUAL] * processor.video_tokens(len(views))
        else:
            ids += [VISUAL] * processor.image_tokens(size, alone=len(views) > 1)
    return config.get_text_config(), torch.tensor(ids)


def variant_of_model(model: Any) -> Variant:
    text = model.config.get_text_config()
    return variant_of(text.model_type) or "base"


def is_composed(model: Any) -> bool:
    return hasattr(model.model, "language_model")


def named_for(model: Any, naming: Naming) -> dict[str, Tensor]:
    """A model's tensors by their names in that kind of checkpoint, a tied head left out."""
    tied = bool(model.config.tie_word_embeddings)
    found = {}
    for name, tensor in _places(model).items():
        if tied and name == "lm_head.weight":
            continue
        if naming == "qwen2" and group_of(name) != "lm":
            continue
        found[from_memory(name, naming)] = tensor.detach()
    return found


def export(
    model: Any, folder: str | Path, naming: Naming, *, tokenizer_from: Path | None = None
) -> list[str]:
    """Write a checkpoint in one of the three namings, each file whole or not at all; returns what
    was left out, in words.

    llava: LLaVA's flat config.json and names. hf: names as llava-hf publishes them. qwen2: the
    language model alone. tokenizer_from: a folder whose tokenizer files go along.
    """
    variant = variant_of_model(model)
    left_out = []
    if not is_composed(model):
        naming = "qwen2"
    weights = named_for(model, naming)
    if naming == "qwen2" and is_composed(model):
        left_out.append("vision tower, projector and newline: qwen2 is a language model alone")
    config = _config_for(model, naming, variant)
    folder = Path(folder)
    for name in TOKENIZER_FILES:
        if tokenizer_from is not None and (tokenizer_from / name).exists():
            _write(folder / name, (tokenizer_from / name).read_bytes())
    save_weights(folder / "model.safetensors", weights)
    _write_json(folder / "generation_config.json", generation_settings(model))
    _write_json(folder / "config.json", config)  # last: without it this is no checkpoint yet
    return left_out


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    atomic_write(path, lambda file: file.write(content))


def _config_for(model: Any, naming: Naming, variant: Variant) -> dict[str, Any]:
    if naming == "llava":
        return configs.flat_config(model.config, variant)
    config = model.config if naming == "hf" else model.config.get_text_config()
    values: dict[str, Any] = configs.with_rope_theta(config.to_dict())
    if naming == "hf":
        values["text_config"] = configs.with_rope_theta(values["text_config"])
    class_name = composed_class(variant).__name__ if naming == "hf" else None
    if class_name:
        values["architectures"] = [class_name]
    return values


def save_adapter(model: Any, path: str | Path) -> None:
    """Write the projector as LLaVA's mm_projector.bin."""
    weights = {
        name: tensor.cpu().clone()
        for name, tensor in named_for(model, "llava").items()
        if "mm_projector." in name
    }
    atomic_write(path, lambda file: torch.save(weights, file))


def load_adapter(model: Any, path: str | Path) -> int:
    """Fill the projector from mm_projector.bin; returns the number of tensors. UserError when one
    is missing or has another shape."""
    places = {n: t for n, t in _places(model).items() if group_of(n) == "projector"}
    filled = set()
    for name, tensor in load_weights(path).items():
        place = to_memory(name[name.find("mm_projector.") :], "llava")
        if place not in places:
            continue
        if places[place].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} is {list(tensor.shape)}, the model's projector needs "
                f"{list(places[place].shape)}"
            )
        places[place].data.copy_(tensor)
        filled.add(place)
    lacking = sorted(set(places) - filled)
    if lacking:
        raise UserError(f"{path} is no adapter for this model: it lacks {', '.join(lacking)}")
    return len(filled)
