"""The one typed description of a vision run. Every field is a flag and a key of a YAML file.

No torch here: `rwkvtune vision train --help` reads this file and must answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.errors import UserError
from rwkvtune.training.config import (
    DeviceOptions,
    OutputOptions,
    Strategy,
    expected,
    fits,
    unknown_settings,
)

PARTS = {
    **dict.fromkeys(("adapter", "proj", "projector"), "adapter"),
    **dict.fromkeys(("rwkv", "llm"), "rwkv"),
    **dict.fromkeys(("encoder", "moda"), "encoder"),
}
"""What train_step may name -> what it is. Upstream passes over words that it does not know."""

PUBLISHED_PEFT = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.01}
"""Of LoRA and its nearest in upstream, where no settings are given."""


@dataclass(frozen=True)
class VisionConfig:
    """Everything that `rwkvtune vision train` can be told."""

    load_model: str = ""
    """Language model: an x070 .pth or .safetensors, also a published file with an adapter in it.
    Its tensors decide every dimension."""
    encoder_path: str = ""
    """Picture encoder: a local folder, or a name on the Hugging Face hub."""
    encoder_type: str = ""
    """siglip (1, and 2 at a fixed size), clip or dinov2; empty = as its config.json says."""
    train_step: str = "adapter"
    """What is trained: adapter (stage 1), adapter rwkv (stage 2), also encoder; proj and projector
    mean adapter, llm rwkv, moda encoder."""
    load_adapter: str = ""
    """A trained adapter to start from; empty = for stage 2 the newest in proj_dir."""
    adapter_hidden: int = 0
    """Width between the adapter's two layers; 0 = 4 * n_embd, which with 2 * n_embd is
    published."""
    adapter_conv: str = ""
    """KERNEL,STRIDE of a convolution over the picture's tokens; 3,2 leaves about half of them."""
    adapter_shuffle: int = 1
    """Side of the squares of picture tokens that become one token; not together with
    adapter_conv."""
    adapter_form: Literal["mlp", "linear"] = "mlp"
    """mlp = two layers, then z + LayerNorm(z); linear = one layer without bias."""
    quant: Literal["none", "4bit", "nf4", "fp4", "8bit", "int8"] = "none"
    """Pack the frozen language model's projections: 4bit = nf4, 8bit = int8."""
    peft: Literal["none", "lora", "rslora", "dora", "pissa", "miss"] = "none"
    """With train_step rwkv, train LoRA or one of its family on its projections in place of all of
    it."""
    peft_config: str = ""
    """JSON of fields of peft's LoraConfig or MissConfig; lora, rslora and dora without it: {"r": 8,
    "lora_alpha": 32, "lora_dropout": 0.01}, as published."""
    n_layer: int | None = None
    """Confirms the file's number of blocks; another number gives a warning."""
    n_embd: int | None = None
    """Confirms the file's width; another number gives a warning."""
    vocab_size: int | None = None
    """Confirms the file's vocabulary; another number gives a warning."""
    head_size: int | None = None
    """Confirms the file's channels per head; another number gives a warning."""
    dim_att: int | None = None
    """Confirms the width of the attention, which is n_embd; another number gives a warning."""
    dim_ffn: int | None = None
    """Confirms the file's width of the channel mix; another number gives a warning."""
    strict_shape: bool = False
    """A dimension that the file contradicts is an error."""

    data_file: str = ""
    """Data set: a folder with chat.json or chat.jsonl and pictures (also in images/, data/ or
    images.zip), or the JSON file itself."""
    form: Literal["prefix", "placeholder"] = "prefix"
    """prefix: pictures, then the dialogue; placeholder: each picture where its <image> stands."""
    keep_image_tag: bool = False
    """prefix: leave <image> in the text, as upstream does."""
    ctx_len: int = 2048
    """Most tokens of a sample, pictures included; what is longer loses its end."""
    tokenizer: str = ""
    """bytes, world, a tokenizer.json or a vocabulary file; empty = the one beside load_model, else
    world for its 65536 ids."""
    data_shuffle: bool = True
    """Another seeded shuffle in each pass; false = the order of the file."""
    bucket_steps: int = 16
    """Samples of so many steps are sorted by length, so that little is padded; 1 = none."""
    num_workers: int = 1
    """Threads that read and resize pictures."""
    on_bad_data: Literal["skip", "refuse"] = "skip"
    """Records and pictures that cannot be used: skip = count, name and leave out; refuse = stop."""
    val_data_file: str = ""
    """Another data set to measure the loss on; empty = none."""
    feature_cache: str = ""
    """Folder in which to keep what the frozen encoder makes of each picture; empty = none."""
    feature_cache_dtype: Literal["exact", "bf16", "int8"] = "exact"
    """Type of the kept features: exact = the encoder's own; int8 = with a scale per token."""
    cache_limit_gb: float = 0.0
    """Refuse a feature cache that would become larger; 0 = any size that the disk holds."""

    micro_bsz: int = 8
    """Samples per device and micro-batch."""
    global_bsz: int = 0
    """Samples per optimizer step, all devices; sets accumulate_grad_batches. 0 = as that says."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step and device."""
    epoch_steps: int = 0
    """Micro-batches per mini-epoch, summed over all devices, as published; 0 = one pass."""
    epoch_count: int = 1
    """Mini-epochs to train."""
    epoch_begin: int = 0
    """Number of the first mini-epoch in the names of files; the learning rate starts at its own
    beginning."""
    lr_schedule: Literal["wsd", "wsd_cosine", "wsd_stable", "cos", "constant"] = "wsd_cosine"
    """wsd = wsd_cosine: world_train.py's own, 100 steps up, then half a cosine wave to 0;
    wsd_stable: plateau, then decay; cos: half a cosine wave to lr_final."""
    lr_init: float = 1e-3
    """Highest learning rate."""
    lr_final: float = 0.0
    """Learning rate at the end of cos and wsd_stable."""
    warmup_steps: int = 100
    """Steps of a further linear warmup from 1 %, on top of the schedule; -1 = none."""
    decay_share: float = 0.2
    """wsd_stable: the last share of the run that decays, 0..1."""
    beta1: float = 0.9
    """Adam's decay of the gradient's mean, per step."""
    beta2: float = 0.99
    """Adam's decay of the squared gradient's mean, per step."""
    adam_eps: float = 1e-8
    """Added outside the root."""
    weight_decay: float = 0.0
    """Of matrices, per step, times the learning rate."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Kind of device; auto = a GPU that torch sees, else the CPU; gpu = the same, and says so where
    there is none; cuda = a GPU or an error; mps = Apple's."""
    devices: int | Literal["auto"] = 1
    """Devices per machine: a number, or auto."""
    num_nodes: int = 1
    """Machines."""
    strategy: Strategy = "auto"
    """How devices share the work; the weights are on each of them, whatever the name."""
    precision: Literal["bf16", "fp32", "tf32", "fp16"] = "bf16"
    """bf16 = products in bf16, what is trained in fp32; frozen matrices are kept in bf16."""
    grad_cp: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    kernel: str = "auto"
    """Backend of the recurrence: auto, chunked or reference."""
    threads: int = 0
    """CPU threads; 0 = torch's choice."""

    proj_dir: str = "out"
    """The run folder."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto = go on with the run that proj_dir holds; never = refuse a folder that holds one;
    required = refuse one that holds none."""
    random_seed: int = 42
    """Initial adapter and shuffled order."""
    epoch_save: int = 1
    """Write adapter-<k>.safetensors every so many mini-epochs; 0 = only at the end."""
    save_every: int = 0
    """Write a resume state every so many steps, besides those at adapter-*; 0 = none."""
    keep_last: int = 2
    """Resume states to keep."""
    save_full: bool = False
    """Also write rwkv-<k>.pth: language model and adapter in one file, with upstream's names."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the tensors in rwkv-<k>.pth; all other files are exact."""
    log_every: int = 10
    """Steps per line of metrics.csv and of the console."""
    throughput_log_steps: int = 0
    """Steps per line of samples/s, tokens/s, visual tokens/s, ms per step and peak memory; 0 =
    off."""
    val_every: int = 0
    """Measure the loss on val_data_file every so many steps; 0 = at the end of each mini-epoch."""
    tensorboard: bool = False
    """Also write TensorBoard events into proj_dir/tensorboard."""
    wandb: str = ""
    """Also log to this wandb project (WANDB_MODE=offline keeps it local)."""

    @property
    def parts(self) -> frozenset[str]:
        """adapter, rwkv, encoder: what is trained."""
        return frozenset(parse_parts(self.train_step))

    @property
    def device_options(self) -> DeviceOptions:
        names = [f.name for f in dataclasses.fields(DeviceOptions) if hasattr(self, f.name)]
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        if values["strategy"] != "auto":
            values["strategy"] = "ddp"
        return DeviceOptions(**values)

    @property
    def output_options(self) -> OutputOptions:
        names = (
            "proj_dir", "resume", "random_seed", "epoch_save", "save_every", "keep_last",
            "log_every", "throughput_log_steps", "val_every", "tensorboard", "wandb",
        )  # fmt: skip
        return OutputOptions(
            log_layers=False, **{n: getattr(self, n) for n in names if hasattr(self, n)}
        )

    @property
    def conv(self) -> tuple[int, int]:
        """Kernel and stride; zeros for none."""
        if not self.adapter_conv:
            return 0, 0
        kernel, _, stride = self.adapter_conv.partition(",")
        return int(kernel), int(stride)

    def problems(self) -> list[str]:
        """All that is wrong with the settings themselves, at once; files are not looked at."""
        values = dataclasses.asdict(self)
        found = [
            f"{name}={values[name]!r} must be {expected(hint)}"
            for name, hint in setting_types().items()
            if not fits(values[name], hint)
        ]
        if found:  # the rest compares numbers
            return found
        missing = {
            "load_model": "the weights of an x070 language model",
            "encoder_path": "the folder of a picture encoder, or its name on the hub",
            "data_file": "a folder with chat.json or chat.jsonl",
        }
        found += [f"{k} is missing: give {what}" for k, what in missing.items() if not values[k]]
        found += [
            f"{name}={values[name]} must be at least {least}"
            for name, least in _AT_LEAST.items()
            if isinstance(values[name], int) and values[name] < least
        ]
        found += [
            f"{name}={values[name]} must be a number from 0 up"
            for name in ("lr_init", "lr_final", "weight_decay", "adam_eps", "grad_clip")
            if not 0 <= values[name] < math.inf
        ]
        found += [
            f"{name}={values[name]} must be in [0, 1)"
            for name in ("beta1", "beta2")
            if not 0 <= values[name] < 1
        ]
        if not 0 < self.decay_share <= 1:
            found.append(f"decay_share={self.decay_share} must be in (0, 1]")
        return found + self._contradictions()

    @property
    def adapter(self) -> AdapterSettings | None:
        """What is trained beside the language model; None = nothing. ValueError for what is no JSON
        object."""
        if self.peft == "none":
            return None
        extra = json.loads(self.peft_config or "{}")
        if not isinstance(extra, dict):
            raise ValueError("not an object")
        if not self.peft_config and self.peft in ("lora", "rslora", "dora"):
            extra = PUBLISHED_PEFT
        return AdapterSettings(self.peft, quant=self.quant, peft_config=extra)

    def _contradictions(self) -> list[str]:
        found = []
        try:
            parts = self.parts
        except UserError as error:
            return [str(error)]
        parsed = [part.strip().isdecimal() for part in self.adapter_conv.split(",")]
        if self.adapter_conv and parsed != [True, True]:
            found.append(f"adapter_conv={self.adapter_conv!r} must be KERNEL,STRIDE, such as 3,2")
        if self.quant != "none" and "rwkv" in parts and self.peft == "none":
            found.append(
                f"quant={self.quant} with train_step {self.train_step}: packed weights cannot be "
                "trained; give --peft lora to train LoRA on them, or --quant none"
            )
        if self.peft != "none" and "rwkv" not in parts:
            found.append(
                f"peft={self.peft} without rwkv in train_step={self.train_step!r} would train "
                "nothing of the language model: add rwkv, or leave peft out"
            )
        if self.peft_config and self.peft == "none":
            found.append(f"peft_config={self.peft_config} needs --peft lora")
        try:
            found += [] if self.adapter is None else self.adapter.problems()
        except ValueError as error:
            found.append(f"peft_config={self.peft_config!r} is no JSON object: {error}")
        if self.feature_cache and "encoder" in parts:
            found.append("feature_cache needs a frozen encoder: take encoder out of train_step")
        return found

    def without_effect(self) -> list[str]:
        """A line for each setting that was changed although the others give it nothing to do."""
        now, default = dataclasses.asdict(self), dataclasses.asdict(VisionConfig())
        rules = (
            (("lr_final",), self.lr_schedule in ("wsd", "wsd_cosine", "constant"),
             f"with lr_schedule={self.lr_schedule}"),
            (("decay_share",), self.lr_schedule != "wsd_stable", "without lr_schedule=wsd_stable"),
            (("val_every",), not self.val_data_file, "without val_data_file"),
            (("feature_cache_dtype", "cache_limit_gb"), not self.feature_cache,
             "without feature_cache"),
            (("keep_image_tag",), self.form == "placeholder", "with form=placeholder"),
            (("bucket_steps",), not self.data_shuffle, "with data_shuffle=false"),
            (("adapter_hidden",), self.adapter_form == "linear", "with adapter_form=linear"),
            (("accumulate_grad_batches",), self.global_bsz > 0, "with global_bsz, which sets it"),
        )  # fmt: skip
        return [
            f"{name}={now[name]!r} does nothing {why}"
            for names, is_idle, why in rules
            for name in names
            if is_idle and now[name] != default[name]
        ]


_AT_LEAST = {
    **dict.fromkeys(("ctx_len", "micro_bsz", "accumulate_grad_batches", "epoch_count"), 1),
    **dict.fromkeys(("devices", "num_nodes", "keep_last", "log_every", "num_workers"), 1),
    **dict.fromkeys(("bucket_steps", "adapter_shuffle"), 1),
    **dict.fromkeys(("epoch_steps", "epoch_begin", "epoch_save", "save_every", "val_every"), 0),
    **dict.fromkeys(("threads", "adapter_hidden", "global_bsz", "throughput_log_steps"), 0),
    "warmup_steps": -1,
}

CONFIRMED = ("n_layer", "n_embd", "vocab_size", "head_size", "dim_att", "dim_ffn")
"""Dimensions that the weights decide and a flag may only confirm."""

MAY_CHANGE_AT_RESUME = frozenset(
    {
        *("epoch_count", "micro_bsz", "global_bsz", "accumulate_grad_batches", "load_model"),
        *("accelerator", "devices", "num_nodes", "strategy", "encoder_path", "encoder_type"),
        *("epoch_save", "save_every", "keep_last", "log_every", "val_every", "save_full"),
        *("tensorboard", "wandb", "resume", "proj_dir", "num_workers", "strict_shape"),
        *("load_adapter", "feature_cache", "cache_limit_gb", "data_file", "val_data_file"),
        *("train_step", "epoch_steps", "throughput_log_steps", *CONFIRMED),
    }
)
"""Settings that may differ from the interrupted run's. What names a file is compared by the file's
content, and lengths by what they come to."""


def parse_parts(text: str) -> list[str]:
    """The parts that train_step names, in their own words; UserError for an unknown one or none."""
    words = text.replace(",", " ").split()
    unknown = [word for word in words if word not in PARTS]
    if unknown or not words:
        raise UserError(
            f"train_step={text!r} {'names ' + unknown[0] if unknown else 'names nothing'}: expected"
            f" one or more of {', '.join(PARTS)}"
        )
    return list(dict.fromkeys(PARTS[word] for word in words))


def setting_types() -> dict[str, Any]:
    """The type of every setting by its name."""
    hints = get_type_hints(VisionConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(VisionConfig)}


def from_flat(values: Mapping[str, Any]) -> VisionConfig:
    """UserError for names that are no settings."""
    known = setting_types()
    unknown = [name for name in values if name not in known]
    if unknown:
        raise UserError(unknown_settings(unknown, known=known, command="rwkvtune vision train"))
    return VisionConfig(**values)


def changes_refused(before: Mapping[str, Any], now: Mapping[str, Any]) -> Sequence[str]:
    """The settings that differ between an interrupted run and this one although they must not."""
    return [
        f"{name}: {before[name]!r} -> {now[name]!r}"
        for name in now
        if name in before and before[name] != now[name] and name not in MAY_CHANGE_AT_RESUME
    ]
