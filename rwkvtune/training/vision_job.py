"""All that a vision run needs, looked at before anything of it exists."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvtune.adapters.adapter import sizes as sizes_of_adapter
from rwkvtune.checkpoint import load_resume_meta, newest_resume_state
from rwkvtune.data.images import Preprocessing
from rwkvtune.data.tokenizers import Tokenizer
from rwkvtune.data.visual import IMAGE_PAD, Assembly, VisualDataset
from rwkvtune.errors import UserError
from rwkvtune.inference.vision import (
    SavedAdapter,
    check_widths,
    find_adapter,
    language_model_weights,
    open_encoder,
    other_encoder,
    read_adapter,
    tokenizer_for,
)
from rwkvtune.models import (
    ModelConfig,
    config_from_state_dict,
)
from rwkvtune.models.vision.config import AdapterConfig
from rwkvtune.models.vision.encoders import Encoder, take_weights
from rwkvtune.training.plan import Plan
from rwkvtune.training.run_state import Progress, read_state
from rwkvtune.training.vision_config import CONFIRMED, VisionConfig, changes_refused
from rwkvtune.training.vision_data import Caches, data_files, open_caches, open_data
from rwkvtune.training.vision_plan import VisionSizes, make_plan


@dataclass(frozen=True)
class VisionJob:
    """A run that nothing speaks against, before anything of it exists."""

    llm: ModelConfig
    llm_weights: dict[str, Tensor]
    tokenizer: Tokenizer
    encoder: Encoder
    preprocessing: Preprocessing
    adapter: AdapterConfig
    start: SavedAdapter | None
    """The adapter that the run begins with; None = initial values, or those of the resume state."""
    data: VisualDataset
    validation: VisualDataset | None
    data_files: tuple[Path, ...]
    caches: Caches
    plan: Plan
    sizes: VisionSizes
    keeps_encoder: bool
    resume: Path | None
    progress: Progress
    settings: dict[str, Any]
    earlier: Path | None
    """A run of another stage in this folder, whose files are moved aside."""
    notes: list[str]


def prepare(
    config: VisionConfig, files: tuple[Path, ...], world_size: int, notes: list[str]
) -> VisionJob:
    """Look at all that the run needs, and raise UserError for what is wrong; writes nothing.

    files: of the training data, as `data_files` lists them.
    """
    folder = Path(config.proj_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"proj_dir={folder} is a file; give a folder, existing or new")
    resume, earlier = _resume_state(config, folder, notes)
    weights, has_adapter = language_model_weights(Path(config.load_model))
    llm = config_from_state_dict(weights)
    if llm.version != "x070":
        raise UserError(f"{config.load_model} is {llm.version}: vision training needs x070 weights")
    _confirm_shapes(config, llm, notes)
    adapted = None
    if config.adapter is not None:  # refuses what does not fit the model
        compute = torch.bfloat16 if config.precision == "bf16" else torch.float32
        adapted = sizes_of_adapter(llm, config.adapter, compute)
    tokenizer = tokenizer_for(Path(config.load_model), llm.vocab_size, config.tokenizer)
    if config.form == "placeholder" and llm.vocab_size <= IMAGE_PAD:
        raise UserError(
            f"form=placeholder uses the ids up to {IMAGE_PAD}, {config.load_model} knows 0 to "
            f"{llm.vocab_size - 1}: use form=prefix"
        )
    trained = "encoder" in config.parts
    dtype = torch.bfloat16 if config.precision == "bf16" and not trained else torch.float32
    encoder, preprocessing = open_encoder(config.encoder_path, config.encoder_type, dtype)
    encoder_id = encoder.fingerprint
    start = None if resume else _starting_adapter(config, folder, has_adapter, encoder, notes)
    if resume:
        _take_saved_encoder(encoder, resume, trained)
    keeps_encoder = trained or encoder.fingerprint != encoder_id
    adapter = _adapter_config(config, llm, encoder, start)
    assembly = Assembly(
        tokenizer,
        adapter.num_tokens(encoder.num_tokens),
        form=config.form,
        keep_image_tag=config.keep_image_tag,
    )
    _check_room(config, assembly)
    data = open_data(config, files, assembly, preprocessing)
    validation = None
    if config.val_data_file:
        others = data_files(Path(config.val_data_file))
        validation = open_data(config, others, assembly, preprocessing)
    caches = open_caches(config, encoder, [data, *([validation] if validation else [])])
    plan, uneven = make_plan(
        config,
        world_size=world_size,
        num_samples=len(data),
        tokens_per_sample=float(data.lengths.clip(max=config.ctx_len).mean()),
    )
    notes += [*uneven, *config.without_effect()]
    if config.lr_schedule in ("wsd", "wsd_cosine"):
        notes.append(
            f"lr_schedule {config.lr_schedule}: world_train.py's curve, 100 steps up from 0, then "
            "half a cosine wave to 0, without a plateau and with lr_final unused; "
            "--lr_schedule wsd_stable has a plateau"
        )
        if plan.total_steps <= 100:
            notes.append(
                f"this run has {plan.total_steps} steps, so it ends while the learning rate still "
                "rises"
            )
    sizes = VisionSizes(
        llm,
        adapter,
        sum(p.numel() for p in encoder.parameters()),
        3 * preprocessing.shape[0] * preprocessing.shape[1],
        int(data.lengths.max()),
        data.label_tokens,
        adapted,
    )
    progress, before = Progress(), {}
    if resume is not None:
        meta = load_resume_meta(resume)
        progress, before = Progress(**meta["progress"]), meta["settings"]
    settings = _settings(config, plan, llm, encoder_id, files)
    refused = changes_refused(before, settings)
    if refused:
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(refused)}. Give the old values "
            "to go on, or another proj_dir for a new run"
        )
    return VisionJob(
        llm, weights, tokenizer, encoder, preprocessing, adapter, start, data, validation, files,
        caches, plan, sizes, keeps_encoder, resume, progress, settings, earlier, notes,
    )  # fmt: skip


def _resume_state(
    config: VisionConfig, folder: Path, notes: list[str]
) -> tuple[Path | None, Path | None]:
    """(the state to go on from, or None; the newest of a run of another stage in the folder)."""
    state = newest_resume_state(folder, report=notes.append)
    if state is not None and config.resume == "never":
        raise UserError(
            f"{folder} already holds a run and resume=never: choose another proj_dir, or --resume "
            "auto to go on"
        )
    if state is None:
        if config.resume == "required":
            raise UserError(f"{folder} holds no run to go on with and resume=required")
        others = [p.name for p in folder.glob("rwkv-*.pth")]
        if others and find_adapter(folder) is None:
            raise UserError(
                f"{folder} holds a run of language-model training ({others[0]}): give another "
                "proj_dir"
            )
        return None, None
    settings = load_resume_meta(state)["settings"]
    if "parts" not in settings:
        raise UserError(f"{folder} holds a run of another kind: give another proj_dir")
    if (settings["parts"], settings["peft"]) == (sorted(config.parts), config.peft):
        return state, None
    return None, state


def _take_saved_encoder(encoder: Encoder, resume: Path, is_trained: bool) -> None:
    """Of a run whose encoder is not that of its folder; where it is trained, its values come with
    the rest of the state."""
    saved = read_state(resume).model
    prefix = "encoder.model."
    weights = {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
    if weights and not is_trained:
        take_weights(encoder, weights, str(resume))


def _confirm_shapes(config: VisionConfig, llm: ModelConfig, notes: list[str]) -> None:
    """Warn of dimensions in flags that the file contradicts, or refuse them."""
    found = dataclasses.asdict(llm) | {"dim_att": llm.n_embd}
    wrong = [
        f"{name} {getattr(config, name)} (the file's is {found[name]})"
        for name in CONFIRMED
        if getattr(config, name) not in (None, 0, found[name])
    ]
    if not wrong:
        return
    text = f"wrong shapes for {config.load_model}: {', '.join(wrong)}"
    if config.strict_shape:
        raise UserError(f"{text}; leave them out, or --strict_shape 0 to take the file's")
    notes.append(f"warning: {text}; the file's are used")


def _starting_adapter(
    config: VisionConfig, folder: Path, has_adapter: bool, encoder: Encoder, notes: list[str]
) -> SavedAdapter | None:
    """The trained adapter that a new run begins with; None = initial values.

    UserError where the language model would be trained on an adapter that has learned nothing.
    """
    path = Path(config.load_adapter) if config.load_adapter else None
    if path is None and config.parts != {"adapter"}:
        path = find_adapter(folder)
        if path is None and has_adapter:
            path = Path(config.load_model)
        if path is None:
            raise UserError(
                f"train_step {config.train_step} begins with a trained adapter, and there is none: "
                f"give --load_adapter FILE or the proj_dir of stage 1 (--train_step adapter); "
                f"{folder} has no adapter-*.safetensors"
            )
    if path is None:
        if has_adapter:
            notes.append(
                f"{config.load_model} has an adapter too, which a new one replaces; --load_adapter "
                f"{config.load_model} would go on with it"
            )
        return None
    saved = read_adapter(path, encoder_width=encoder.width)
    check_widths(saved, encoder)
    notes += other_encoder(saved, encoder)
    notes.append(f"the adapter comes from {saved.path}: all {len(saved.weights)} tensors of it")
    if saved.encoder_weights:
        take_weights(encoder, saved.encoder_weights, str(saved.path))
        notes.append("and the encoder's weights, which were trained with it")
    return saved


def _adapter_config(
    config: VisionConfig, llm: ModelConfig, encoder: Encoder, start: SavedAdapter | None
) -> AdapterConfig:
    if start is not None:
        if start.config.n_embd != llm.n_embd:
            raise UserError(
                f"{start.path} is for models of width {start.config.n_embd}, {config.load_model} "
                f"has {llm.n_embd}"
            )
        return start.config
    is_mlp = config.adapter_form == "mlp"
    kernel, stride = config.conv
    return AdapterConfig(
        encoder.width,
        llm.n_embd,
        (config.adapter_hidden or 4 * llm.n_embd) if is_mlp else 0,
        kernel,
        stride,
        config.adapter_shuffle,
        norm=is_mlp,
    )


def _check_room(config: VisionConfig, assembly: Assembly) -> None:
    if assembly.image_tokens >= config.ctx_len:
        raise UserError(
            f"a picture takes {assembly.image_tokens} tokens, which leaves nothing of ctx_len "
            f"{config.ctx_len} for an answer: give a larger ctx_len, or --adapter_conv 3,2"
        )


def _settings(
    config: VisionConfig, plan: Plan, llm: ModelConfig, encoder_id: str, files: Sequence[Path]
) -> dict[str, Any]:
    """What a resume compares, with what was left open replaced by what it came to."""
    return dataclasses.asdict(config) | {
        "parts": sorted(config.parts),
        "steps_per_epoch": plan.epoch_steps,
        "global_batch": plan.global_bsz,
        "data": "; ".join(map(_fingerprint, files)),
        "encoder": encoder_id,
        "version": llm.version,
        "model": dataclasses.asdict(llm),
    }


def _fingerprint(path: Path) -> str:
    """Tells another file of the same name: size, and a checksum over both ends."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        crc = zlib.crc32(file.read(), crc)
    return f"{size} bytes, crc32 {crc:08x}"
