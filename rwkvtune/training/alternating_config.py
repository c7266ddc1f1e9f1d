"""Every setting of `train_alternating.py`: each field is a flag, named as LLaVA's where it has it.

No torch here: `--help` reads these classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.models.alternating.variants import Variant


@dataclass(frozen=True)
class TaskOptions:
    """What to do: without one of the inspecting flags, train."""

    variant: Literal["auto", "alternating", "alternating_cross", "base"] = "auto"
    """The variant you expect the checkpoint to be; another one is refused with exit code 3."""
    force: bool = False
    """Go on, with the checkpoint's own class, where the variant does not match."""
    force_class: Variant | None = None
    """Build this class with the checkpoint's weights, whatever its config.json says; every tensor
    has to match."""
    init_from_backbone: bool = False
    """Start from a language model, --backbone_model: copy what agrees in name and shape."""
    dry_run: bool = False
    """Print the checkpoint's model_type from its config.json, and stop."""
    dry_run_step: bool = False
    """Load the weights, print the classes, do one training step, write nothing, and stop; exit code
    4 where that fails."""
    inspect_data: bool = False
    """Print the number of samples and the first one, and stop."""
    inspect_data_verbose: bool = False
    """With --inspect_data: also the first sample's tokens, labels and views."""
    inspect_weights: bool = False
    """Print which tensors would be copied, missing or left out, and stop."""
    json: bool = False
    """Print the result of an inspecting flag as JSON on standard output, all else on standard
    error."""
    allow_download: bool = False
    """Fetch a checkpoint that is neither a folder nor in the local cache."""
    throughput_log_steps: int = 50
    """Steps per line of samples/s, tokens/s, visual tokens/s, ms per step and peak memory; 0 =
    off."""


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    model_name_or_path: str = ""
    """Checkpoint to start from: LLaVA-OneVision or an alternating one, in LLaVA's or llava-hf's
    naming."""
    alt_checkpoint: str = ""
    """The same, and preferred over the others."""
    backbone_model: str = ""
    """Language model (Qwen2) for --init_from_backbone; with --model_name_or_path, all else is that
    checkpoint's."""
    vision_tower: str = ""
    """SigLIP's folder, for a backbone, or for a checkpoint that only names its tower; empty =
    google/siglip-so400m-patch14-384, if it is here."""
    pretrain_mm_mlp_adapter: str = ""
    """mm_projector.bin to start the projector from."""
    lora_weight_path: str = ""
    """peft adapter to merge into the weights before training."""
    schedule: str = ""
    """Special layers: alternate_keep_last, alternate, first_k:K, last_k:K, none, or 1,3,5; empty =
    the checkpoint's, else alternate_keep_last."""
    text_only: Literal["formula", "causal"] | None = None
    """Special layers of a sample without images: follow the formula or be causal."""
    legacy_decode_rows: bool | None = None
    """Decode with a cache as the original program did, with its fault."""
    attn_implementation: str = ""
    """split, sdpa or eager; empty = split."""
    mm_projector_type: str | None = None
    """Only mlp2x_gelu, LLaVA-OneVision's."""
    mm_resampler_type: str | None = None
    """Accepted; LLaVA-OneVision never applies its resamplers."""
    mm_vision_select_layer: int | None = None
    """Accepted; LLaVA's SigLIP ignores it and takes the last but one layer, as here."""
    mm_vision_select_feature: str | None = None
    """Accepted; SigLIP has only patches."""
    mm_patch_merge_type: str | None = None
    """spatial_unpad, spatial, flat, also with _maxpool2x2 or _nobase; unset = the checkpoint's."""
    mm_newline_position: Literal["grid", "frame", "one_token", "no_token"] | None = None
    """Newline tokens of a video; unset = the checkpoint's, else one_token."""
    mm_spatial_pool_stride: int | None = None
    """Pooling of video frames; unset = the checkpoint's, else 2."""
    mm_spatial_pool_mode: Literal["bilinear", "average", "max"] | None = None
    """The same."""
    mm_use_im_start_end: bool = False
    """Put <im_start> and <im_end> around each image."""
    mm_use_im_patch_token: bool = True
    """Accepted; no patch token is ever used."""
    delay_load: bool = True
    """Accepted; the vision tower is loaded with the rest."""


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    data_path: str = ""
    """LLaVA manifest: .json, .jsonl, .yaml, or PREFIX{a,b}.json."""
    image_folder: str = ""
    """Where relative paths of images begin; empty = at the manifest."""
    video_folder: str = ""
    """Where relative paths of frames begin; empty = at the manifest."""
    version: str = "qwen_2"
    """Conversation template: qwen_1_5, qwen_2, qwen_2_5 or plain."""
    label_mode: Literal["llava", "assistant_only"] = "llava"
    """llava: learn the assistant's turns, and every newline and turn marker; assistant_only: the
    answers and their end."""
    image_aspect_ratio: str | None = None
    """square, pad, anyres or anyres_max_N; unset = the checkpoint's."""
    image_grid_pinpoints: str | None = None
    """Canvases of anyres: (1x1),...,(6x6) in views, or [[width, height], ...]; unset = the
    checkpoint's."""
    frames_upbound: int = 0
    """Frames of a video that are used, at equal distances; 0 = all."""
    video_fps: float = 1.0
    """Frames per second of the frame lists, for --add_time_instruction."""
    add_time_instruction: bool = False
    """Say in the question how long the video is and when its frames are."""
    force_sample: bool = False
    """Accepted; frames are always taken at equal distances."""
    is_multimodal: bool = True
    """Put a turn's single <image> at its front."""
    lazy_preprocess: bool = True
    """Accepted; images are always read when their sample is needed."""
    early_mix_text: bool = False
    """Accepted; samples without images are mixed in by themselves."""
    model_max_length: int = 4096
    """Tokens of a sample, images included; what exceeds is cut."""


@dataclass(frozen=True)
class TuneOptions:
    """Which parts learn, and how fast."""

    mm_tunable_parts: str = ""
    """Comma list of mm_mlp_adapter, mm_vision_tower, mm_language_model, mm_vision_resampler; empty
    = the language model and the projector. Wins over the next three."""
    freeze_backbone: bool = False
    """The language model does not learn."""
    tune_mm_mlp_adapter: bool = False
    """Only the projector learns."""
    unfreeze_mm_vision_tower: bool = False
    """The vision tower learns too."""
    learning_rate: float = 2e-5
    """Highest learning rate."""
    mm_projector_lr: float | None = None
    """That of the projector; unset = learning_rate."""
    mm_vision_tower_lr: float | None = None
    """That of the vision tower; unset = learning_rate."""
    lora_enable: bool = False
    """Train low-rank adapters in the place of the language model's matrices: LLaVA's name for
    --peft lora."""
    peft: Literal["none", "lora", "rslora", "dora", "miss"] = "none"
    """Kind of the adapters; none = lora with --lora_enable, else no adapters."""
    lora_r: int = 64
    """Rank."""
    lora_alpha: int = 16
    """Their scale is alpha / r, rslora: alpha / sqrt(r)."""
    lora_dropout: float = 0.05
    """Dropout before them."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that learn too."""


@dataclass(frozen=True)
class TrainerOptions:
    """Training (transformers' Trainer)."""

    output_dir: str = ""
    """Folder of the run: checkpoint-N while it runs, the model at the end. The same command goes on
    with a run that was stopped."""
    do_train: bool = True
    """Accepted; it trains unless a flag says to inspect."""
    per_device_train_batch_size: int = 8
    """Samples per device and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; -1 = as many as the epochs have."""
    weight_decay: float = 0.0
    """Of matrices only."""
    warmup_ratio: float = 0.0
    """Share of the steps that warm up."""
    warmup_steps: int = 0
    """Steps that warm up; wins over the ratio."""
    lr_scheduler_type: str = "cosine"
    """cosine, linear, constant, constant_with_warmup, ..."""
    optim: str = "adamw_torch"
    """Optimizer, by transformers' names."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    bf16: bool = False
    """bf16 compute with fp32 weights."""
    fp16: bool = False
    """fp16 compute with fp32 weights, on a GPU."""
    tf32: bool | None = None
    """TF32 products, on a GPU."""
    bits: Literal[4, 8, 16] = 16
    """4 or 8: pack the language model's matrices, which do not learn, under adapters."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The values that 4 bits stand for."""
    double_quant: bool = True
    """Accepted; the scales of packed matrices stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""
    group_by_length: bool = False
    """Samples of like length in a batch."""
    group_by_modality_length: bool = False
    """And of one modality."""
    group_by_modality_length_auto: bool = False
    """The same; unlike LLaVA's it loses no samples."""
    group_by_varlen: bool = False
    """All samples sorted by length, batches shuffled."""
    logging_steps: int = 10
    """Steps per line of the loss."""
    save_steps: int = 500
    """Steps per checkpoint."""
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When checkpoints are written."""
    save_total_limit: int = 2
    """Checkpoints that stay."""
    seed: int = 42
    """Order of samples, initial values of new parts, dropout."""
    dataloader_num_workers: int = 0
    """Processes that read images."""
    dataloader_drop_last: bool = False
    """Leave a last, smaller batch out."""
    report_to: str = "none"
    """none, tensorboard or wandb."""
    run_name: str = ""
    """For them."""
    deepspeed: str = ""
    """DeepSpeed configuration, where that package is installed."""
    ddp_find_unused_parameters: bool | None = None
    """For torch's data parallel."""
    torch_compile: bool = False
    """Compile the model first."""
    torch_compile_backend: str = ""
    """By which backend; empty = torch's own choice."""
    eval_strategy: Literal["no"] = "no"
    """Accepted; `rwkvtune alternating eval` asks a trained model."""
    evaluation_strategy: Literal["no"] = "no"
    """The older name of eval_strategy."""
    per_device_eval_batch_size: int = 8
    """Accepted; nothing is evaluated during training."""
    remove_unused_columns: bool = False
    """Accepted; samples are never stripped."""
    use_cpu: bool = False
    """Train on the CPU where there is a GPU."""
    save_naming: Literal["auto", "llava", "hf"] = "auto"
    """Naming of the final weights; auto = as in the checkpoint that the run started from."""


@dataclass(frozen=True)
class AlternatingSettings:
    """Everything that `train_alternating.py` can be told."""

    task: TaskOptions = field(default_factory=TaskOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> AlternatingSettings:
        """Build one from one flat mapping of field name -> value."""
        parts = {}
        for part in dataclasses.fields(cls):
            group: Any = part.default_factory
            names = [f.name for f in dataclasses.fields(group)]
            parts[part.name] = group(**{n: values[n] for n in names if n in values})
        return cls(**parts)

    def to_flat(self) -> dict[str, Any]:
        groups = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return {f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)}

    def problems(self) -> list[str]:
        """All that is wrong with the settings themselves; files are not looked at."""
        m, t = self.model, self.trainer
        found = [
            f"{name}={self.to_flat()[name]} must be at least {least}"
            for name, least in _AT_LEAST.items()
            if self.to_flat()[name] < least
        ]
        if not (m.alt_checkpoint or m.model_name_or_path or m.backbone_model):
            found.append(
                "no model is given: --model_name_or_path or --alt_checkpoint for a checkpoint, or "
                "--backbone_model with --init_from_backbone"
            )
        if self.task.init_from_backbone and not m.backbone_model:
            found.append("--init_from_backbone needs --backbone_model")
        if m.attn_implementation not in ("", "split", "sdpa", "eager"):
            found.append(
                f"attn_implementation={m.attn_implementation} cannot follow the masks: choose "
                "split, sdpa or eager"
            )
        if t.bits != 16 and self.adapter is None:
            found.append(
                f"bits={t.bits}: packed matrices cannot learn; add --lora_enable (or --peft KIND), "
                "or leave bits out"
            )
        if t.bf16 and t.fp16:
            found.append("bf16 and fp16 are two precisions: give one")
        if m.mm_projector_type not in (None, "mlp2x_gelu"):
            found.append(f"mm_projector_type={m.mm_projector_type}: only mlp2x_gelu is supported")
        parts = [p for p in self.tune.mm_tunable_parts.split(",") if p]
        unknown = sorted(set(parts) - set(TUNABLE_PARTS))
        if unknown:
            found.append(
                f"mm_tunable_parts has {', '.join(unknown)}: choose from {', '.join(TUNABLE_PARTS)}"
            )
        if len(self.groupings) > 1:
            found.append(f"{' and '.join(self.groupings)} are different orders: give one")
        return found

    def without_effect(self) -> list[str]:
        """A line for each flag that was given although it changes nothing."""
        now, default = self.to_flat(), AlternatingSettings().to_flat()
        reasons = {name: reason for name, reason in _ACCEPTED.items() if now[name] != default[name]}
        if self.model.alt_checkpoint and self.model.model_name_or_path:
            reasons["model_name_or_path"] = "alt_checkpoint is preferred"
        tune, trainer = self.tune, self.trainer
        if tune.peft == "miss" and tune.lora_alpha != default["lora_alpha"]:
            reasons["lora_alpha"] = "peft=miss has no such scale"
        if trainer.quant_type != default["quant_type"] and trainer.bits != 4:
            reasons["quant_type"] = f"bits is {trainer.bits}"
        if self.model.alt_checkpoint and self.task.init_from_backbone:
            reasons["init_from_backbone"] = "alt_checkpoint already is an alternating model"
        lines = [f"{name}={now[name]!r} does nothing: {why}" for name, why in reasons.items()]
        if "mm_vision_resampler" in self.tune.mm_tunable_parts.split(","):
            lines.append("mm_tunable_parts: mm_vision_resampler is no part of these models")
        return lines

    @property
    def fixed_in_a_run(self) -> dict[str, Any]:
        """What a run that goes on has to be told again; folders and files by their last names."""
        values = {n: v for n, v in self.to_flat().items() if n not in _MAY_CHANGE_AT_RESUME}
        return values | {name: Path(values[name]).name for name in _PATHS}

    @property
    def adapter(self) -> AdapterSettings | None:
        """None where whole matrices learn."""
        tune, trainer = self.tune, self.trainer
        if tune.peft == "none" and not tune.lora_enable:
            return None
        kind = "lora" if tune.peft == "none" else tune.peft
        return AdapterSettings(
            kind,
            r=tune.lora_r,
            alpha=None if kind == "miss" else tune.lora_alpha,
            quant={4: trainer.quant_type, 8: "int8", 16: "none"}[trainer.bits],
        )

    @property
    def groupings(self) -> list[str]:
        names = ("length", "modality_length", "modality_length_auto", "varlen")
        return [name for name in names if getattr(self.trainer, f"group_by_{name}")]

    @property
    def mask_settings(self) -> dict[str, Any]:
        """What was said about the special layers."""
        values = {
            "mask_schedule": self.model.schedule or None,
            "text_only": self.model.text_only,
            "legacy_decode_rows": self.model.legacy_decode_rows,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def llava(self) -> dict[str, Any]:
        """Fields of LLaVA's configuration that flags override."""
        names = ("mm_patch_merge_type", "mm_newline_position", "mm_spatial_pool_stride")
        values = {n: getattr(self.model, n) for n in (*names, "mm_spatial_pool_mode")}
        values["image_aspect_ratio"] = self.data.image_aspect_ratio
        values["image_grid_pinpoints"] = self.data.image_grid_pinpoints
        return {name: value for name, value in values.items() if value is not None}


TUNABLE_PARTS = ("mm_mlp_adapter", "mm_vision_resampler", "mm_vision_tower", "mm_language_model")

_PATHS = (
    *("model_name_or_path", "alt_checkpoint", "backbone_model", "vision_tower"),
    *("pretrain_mm_mlp_adapter", "lora_weight_path", "data_path", "image_folder", "video_folder"),
)
_MAY_CHANGE_AT_RESUME = frozenset(
    {
        *(f.name for f in dataclasses.fields(TaskOptions)),
        *("output_dir", "do_train", "num_train_epochs", "max_steps", "save_naming", "use_cpu"),
        *("logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to"),
        *("run_name", "dataloader_num_workers", "gradient_checkpointing", "torch_compile"),
        *("torch_compile_backend", "eval_strategy", "evaluation_strategy"),
        *("per_device_eval_batch_size", "delay_load"),
        *("attn_implementation", "deepspeed", "ddp_find_unused_parameters", "tf32"),
    }
)
_AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("logging_steps", "save_steps", "save_total_limit", "lora_r"), 1),
    **dict.fromkeys(("model_max_length",), 8),
    **dict.fromkeys(("throughput_log_steps", "frames_upbound", "dataloader_num_workers"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay", "num_train_epochs", "warmup_ratio"), 0),
}
_ACCEPTED = {
    "mm_resampler_type": "LLaVA-OneVision never applies its resamplers",
    "mm_vision_select_layer": "LLaVA's SigLIP takes the last but one layer",
    "mm_vision_select_feature": "SigLIP has only patches",
    "mm_use_im_patch_token": "no patch token is ever used",
    "force_sample": "frames are always taken at equal distances",
    "lazy_preprocess": "images are always read when their sample is needed",
    "early_mix_text": "samples without images are mixed in by themselves",
    "remove_unused_columns": "samples are never stripped",
    "double_quant": "the scales of packed matrices stay fp32",
    "delay_load": "the vision tower is loaded with the rest",
    "per_device_eval_batch_size": "nothing is evaluated during training",
    "do_train": "it trains unless a flag says to inspect",
}
