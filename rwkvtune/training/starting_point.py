"""Where a run starts from: its own resume state, weights found in its folder, a given file, or
nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvtune.checkpoint import load_resume_meta, load_weights, newest_resume_state
from rwkvtune.configs import ModelConfig as Preset
from rwkvtune.configs import load_model_config
from rwkvtune.configs.comparison import differences, disagreement
from rwkvtune.data.tokenizers import Tokenizer
from rwkvtune.errors import UserError
from rwkvtune.models import (
    CONFIG_CLASSES,
    CONFIGS,
    ModelConfig,
    build_model,
    config_from_shapes,
    config_from_state_dict,
    fill_model,
    recognise_version,
)
from rwkvtune.models.rwkv7.config import RWKV7Config
from rwkvtune.training.config import FRESH_VERSION, ModelOptions, TrainConfig
from rwkvtune.training.run_state import Progress
from rwkvtune.weights_header import numbered_weights, read_header

DIMENSIONS = (
    "n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn",
    "mix_rank", "decay_rank", "a_rank", "v_rank", "g_rank",
)  # fmt: skip
"""Settings that say what a model looks like; not every version has all of them."""

WEIGHTS_OF = "weights of "


@dataclass
class StartingPoint:
    model_config: ModelConfig
    source: str
    """What the start of the run prints."""
    weights: dict[str, Tensor] | None = None
    """To load into the model; None = initial values, or those of the resume state."""
    has_gaps: bool = False
    """The weights lack tensors, which get initial values."""
    base_path: str = ""
    """With an adapter: the file of the weights that stay frozen."""
    resume_state: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """The interrupted run's settings."""
    progress: Progress = field(default_factory=Progress)
    """The interrupted run's progress."""
    epochs_behind: int = 0
    """Mini-epochs that bare weights rwkv-N.pth have behind them: N + 1."""
    problems: list[str] = field(default_factory=list)
    """Model flags that disagree with the interrupted run."""
    seen: tuple[str, ...] = ()
    """What the folder held, to notice that another run has gone on in it since."""


def find(config: TrainConfig, tokenizer: Tokenizer | None, notes: list[str]) -> StartingPoint:
    """Look into proj_dir and at load_model; nothing is written.

    The newest good resume state wins; then the highest rwkv-N.pth, which restarts the optimizer and
    warms up as upstream does; then load_model; then rwkv-init.pth; then the weights of the preset;
    then fresh weights.
    notes: gets a line for each thing that a reader of the run should know.
    """
    seen = contents(Path(config.output.proj_dir))
    start = _find(config, tokenizer, notes)
    start.seen = seen
    return start


def contents(folder: Path) -> tuple[str, ...]:
    """Names of the weights and resume states in a run folder."""
    paths = [*folder.glob("rwkv-*.pth"), *folder.glob("adapter-*"), *folder.glob("resume/*")]
    return tuple(sorted(path.name for path in paths))


def _find(config: TrainConfig, tokenizer: Tokenizer | None, notes: list[str]) -> StartingPoint:
    folder = Path(config.output.proj_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"proj_dir={folder} is a file; give a folder, existing or new")
    numbered = numbered_weights(folder)
    initial, final = folder / "rwkv-init.pth", folder / "rwkv-final.pth"
    state = newest_resume_state(folder, report=notes.append)
    adapters = sorted(path.name for path in folder.glob("adapter-*"))
    holds_a_run = state or numbered or initial.exists() or final.exists() or adapters
    if config.output.resume == "never" and holds_a_run:
        raise UserError(
            f"{folder} already holds a run and resume=never: choose another proj_dir, or "
            "--resume auto to go on"
        )
    if config.output.resume == "required" and not holds_a_run:
        raise UserError(
            f"{folder} holds no run to go on with and resume=required: write its rwkv-init.pth "
            "first (--init_only true, RWKV-LM's stage 1), or check proj_dir"
        )
    preset = preset_of(config.model)
    given = config.model.load_model
    if config.output.init_only:
        if state or numbered or final.exists():
            raise UserError(
                f"{folder} holds a run that has begun, and init_only would give it other initial "
                "weights: choose another proj_dir, or leave init_only out to go on"
            )
        if initial.exists():
            notes.append(f"{initial} is written anew")
        return _new_run(config.model, preset, tokenizer, notes)
    if config.adapter.peft != "none" or adapters:
        return _with_adapter(config, preset, state, adapters, tokenizer, notes)
    if state is not None:
        meta = load_resume_meta(state)
        recorded = CONFIG_CLASSES[meta["settings"]["version"]](**meta["settings"]["model"])
        return StartingPoint(
            recorded,
            f"resumed from {state}",
            resume_state=state,
            settings=meta["settings"],
            progress=Progress(**meta["progress"]),
            problems=_disagreements(config.model, recorded, "the run")
            + _preset_problems(preset, recorded),
        )
    if numbered:
        number, path = numbered[-1]
        notes.append(
            f"resume: {folder} has no resume state, so training goes on from {path.name} after "
            f"mini-epoch {number}, with a new optimizer and a new warmup"
            + (f"; load_model={given} is not used" if given else "")
        )
        return _from_file(config.model, preset, path, notes, epochs_behind=number + 1)
    if final.exists():
        raise UserError(
            f"{folder} holds a finished run without a resume state: to train on from its weights, "
            f"give --load_model {final} and another proj_dir"
        )
    if initial.exists() and not given:
        return _from_file(config.model, preset, initial, notes)
    return _new_run(config.model, preset, tokenizer, notes)


def _with_adapter(
    config: TrainConfig,
    preset: Preset | None,
    state: Path | None,
    adapters: list[str],
    tokenizer: Tokenizer | None,
    notes: list[str],
) -> StartingPoint:
    """The base's weights, and what the run has of its adapter; UserError for a folder that holds
    something else."""
    folder = Path(config.output.proj_dir)
    peft = config.adapter.peft
    if state is None and adapters:
        raise UserError(
            f"{folder} holds {adapters[-1]} without a resume state to go on from: use it (rwkvtune "
            "merge), or choose another proj_dir"
        )
    meta = {} if state is None else load_resume_meta(state)
    before = meta.get("settings", {}).get("peft", "none")
    if numbered_weights(folder) or (state is not None and before != peft):
        raise UserError(
            f"{folder} holds a run with peft={before}, and this one has peft={peft}: choose "
            "another proj_dir, or give the old value to go on"
        )
    start = _new_run(config.model, preset, tokenizer, notes)
    start.base_path = start.source.removeprefix(WEIGHTS_OF)
    if state is not None:
        start.source = f"resumed from {state}, base {start.base_path}"
        start.resume_state, start.settings = state, meta["settings"]
        start.progress = Progress(**meta["progress"])
        recorded = CONFIG_CLASSES[meta["settings"]["version"]](**meta["settings"]["model"])
        start.problems = _disagreements(config.model, recorded, "the run")
    return start


def model_config_of(flags: ModelOptions) -> ModelConfig:
    """The model that the flags describe, without reading its weights: of a preset, of a file's
    header, or fresh."""
    preset = preset_of(flags)
    if preset is not None:
        return preset.dimensions
    if not flags.load_model:
        return _fresh_config(flags, None)
    header = read_header(flags.load_model)
    if header is None:
        raise UserError(
            f"{flags.load_model} does not tell its dimensions without being read whole: give them "
            "by flags, and leave load_model out"
        )
    return config_from_shapes({name: info.shape for name, info in header.tensors.items()})


def preset_of(flags: ModelOptions) -> Preset | None:
    """The preset that the flags name; UserError when there is none or other flags contradict it."""
    if not flags.model_config:
        return None
    preset = load_model_config(flags.model_config)
    wrong = _disagreements(flags, preset.dimensions, "preset")
    if wrong:
        raise UserError(
            f"the model flags disagree with preset {preset.shown_as}: {'; '.join(wrong)}. Leave "
            "them out, or leave model_config out"
        )
    if flags.interpolate:
        raise UserError(
            "interpolate resizes weights, and model_config says that they have the preset's "
            "dimensions: give the new dimensions by flags, and leave model_config out"
        )
    return preset


def weights_named(flags: ModelOptions, preset: Preset | None) -> Path | None:
    """The file that a flag names, else the preset; UserError for a preset's that is nowhere."""
    if flags.load_model:
        return Path(flags.load_model)
    if preset is not None and preset.model_file is not None:
        return preset.find_weights()
    return None


def preset_rows(config: TrainConfig) -> list[tuple[str, str]]:
    """What a run that has a preset shows of it at its start."""
    preset = preset_of(config.model)
    if preset is None:
        return []
    flat = config.to_flat()
    values = [
        f"{name} {value:g}"
        + ("" if flat[name] == value else f" (not followed: {name} {flat[name]:g})")
        for name, value in preset.recommended().items()
    ]
    rows = [("preset", preset.shown_as), ("recommended", ", ".join(values) or "nothing")]
    return [*rows, ("learning rate", f"{flat['lr_init']:g} to {flat['lr_final']:g}")]


def _new_run(
    flags: ModelOptions, preset: Preset | None, tokenizer: Tokenizer | None, notes: list[str]
) -> StartingPoint:
    """From the weights that a flag names, else the preset, else from initial values."""
    given = weights_named(flags, preset)
    if given:
        return _from_file(flags, preset, given, notes, may_resize=True)
    config = _fresh_config(flags, tokenizer) if preset is None else preset.dimensions
    return StartingPoint(config, "initial values")


def _preset_problems(preset: Preset | None, found: ModelConfig) -> list[str]:
    """Dimensions that an interrupted run and the preset do not share."""
    if preset is None:
        return []
    if not isinstance(found, RWKV7Config):
        return [f"the run is {found.version}, preset {preset.shown_as} {preset.dimensions.version}"]
    return [
        f"{name}: preset {said}, the run {real}" for name, said, real in differences(preset, found)
    ]


def check_preset(preset: Preset, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """UserError, with the preset corrected, for weights that do not have its dimensions."""
    found = recognise_version(shapes)
    if found.version != preset.dimensions.version:
        raise UserError(
            f"{path} holds {found}, and preset {preset.shown_as} is for RWKV-7 "
            f"{preset.dimensions.version}: leave model_config out, the dimensions are read from "
            "the weights"
        )
    dimensions = config_from_shapes(shapes)
    assert isinstance(dimensions, RWKV7Config)
    message = disagreement(preset, dimensions, str(path))
    if message:
        raise UserError(message)


def _from_file(
    flags: ModelOptions,
    preset: Preset | None,
    path: Path,
    notes: list[str],
    *,
    epochs_behind: int = 0,
    may_resize: bool = False,
) -> StartingPoint:
    header = None if preset is None else read_header(path)
    if preset is not None and header is not None:  # before gigabytes are read
        check_preset(preset, {name: info.shape for name, info in header.tensors.items()}, path)
    weights = load_weights(path)
    if preset is not None and header is None:
        check_preset(preset, {name: tuple(w.shape) for name, w in weights.items()}, path)
    config = config_from_state_dict(weights)
    may_resize = may_resize and flags.interpolate
    if may_resize:
        sizes = asdict(config)
        wanted = {name: size for name, size in _given(flags).items() if name in sizes}
        config = type(config)(**(sizes | wanted))
        weights = _interpolated(weights, config, notes)
    lacking = _check_fits(weights, config, path, may_lack=may_resize or flags.load_partial)
    notes += [f"initial values for {name}: not in {path}" for name in lacking]
    wrong = _disagreements(flags, config, "file")
    if wrong:
        raise UserError(
            f"the model settings disagree with {path}: {'; '.join(wrong)}. Leave these out: "
            "dimensions are read from the weights (or, with load_model, resize them by "
            "--interpolate true)"
        )
    return StartingPoint(
        config, f"{WEIGHTS_OF}{path}", weights, bool(lacking), epochs_behind=epochs_behind
    )


def _check_fits(
    weights: Mapping[str, Tensor], config: ModelConfig, path: Path, *, may_lack: bool
) -> list[str]:
    """Names of the model's tensors that the weights lack, which is all right if they may.

    UserError, before the run folder is made, for tensors that are missing or do not fit.
    """
    with torch.device("meta"):
        model = build_model(config, initial_values=False)
    whole = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: copying to a meta tensor does nothing
        fill_model(model, {**whole, **weights} if may_lack else weights, str(path))
    return [name for name in whole if name not in weights] if may_lack else []


def _given(flags: ModelOptions) -> dict[str, int]:
    """The dimensions that flags say."""
    sizes = {name: getattr(flags, name) for name in DIMENSIONS}
    return {name: size for name, size in sizes.items() if size is not None}


def _disagreements(flags: ModelOptions, found: ModelConfig, source: str) -> list[str]:
    """Dimensions for which flags say something else than the weights."""
    are = asdict(found)
    wrong = [
        f"{name}: flag {size}, {source} {are[name]}"
        if name in are
        else f"{name}: flag {size}, {source} is {found.version} and has none"
        for name, size in _given(flags).items()
        if size != are.get(name)
    ]
    if flags.version not in (None, found.version):
        wrong.insert(0, f"version: flag {flags.version}, {source} {found.version}")
    return wrong


def _fresh_config(flags: ModelOptions, tokenizer: Tokenizer | None) -> ModelConfig:
    version = flags.version or FRESH_VERSION
    defaults = {
        "n_layer": 12,
        "n_embd": 768,
        "head_size": 64,
        "vocab_size": 65536 if tokenizer is None else tokenizer.vocab_size,
    }
    given, config_class = _given(flags), CONFIG_CLASSES[version]
    known = [f.name for f in fields(config_class)]
    foreign = [name for name in given if name not in known]
    if foreign:
        raise UserError(
            f"an {version} model has no {' and no '.join(foreign)}: leave it out; its dimensions "
            f"are {', '.join(known)}"
        )
    return config_class(**(defaults | given))


def _interpolated(
    weights: Mapping[str, Tensor], target: ModelConfig, notes: list[str]
) -> dict[str, Tensor]:
    """Every tensor of a file resized to a model of other dimensions.

    As upstream's stage 1: along the first axis, position i of n takes the value at i * (rows / n),
    linear between two rows.  UserError for a tensor that has no place there, or differs in its
    other axes.
    """
    shapes = {n: torch.Size(s) for n, s in CONFIGS[target.version].tensor_shapes(target).items()}
    unknown = [name for name in weights if name not in shapes]
    if unknown:
        raise UserError(
            f"these weights hold {unknown[0]}, which the wanted model (n_layer {target.n_layer}) "
            "does not have"
        )
    result = {}
    for name, tensor in weights.items():
        shape = shapes[name]
        if tensor.numel() == shape.numel():
            result[name] = tensor.reshape(shape)
            continue
        source, wanted = tensor.squeeze().float(), torch.empty(shape, device="meta").squeeze()
        if source.shape[1:] != wanted.shape[1:]:
            raise UserError(
                f"cannot resize {name} from {list(tensor.shape)} to {list(shape)}: only its first "
                "axis may differ"
            )
        rows, n = source.shape[0], wanted.shape[0]
        position = (torch.arange(n) * (rows / n)).clamp_max(rows - 1)
        low = position.floor().long()
        share = (position - low).view(-1, *[1] * (source.dim() - 1))
        high = (low + 1).clamp_max(rows - 1)
        result[name] = (source[low] * (1 - share) + source[high] * share).reshape(shape)
        notes.append(f"interpolated {name}: {list(tensor.shape)} -> {list(shape)}")
    return result
