"""The one typed description of a pretraining run. Every field is a flag, a YAML key and a line of
this file.

No torch here: `rwkvtune train --help` reads these classes and must answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.errors import UserError

Version = Literal["x052", "x060", "x070"]
FRESH_VERSION: Version = "x070"
"""Of a fresh model when nothing says which."""
Order = Literal["published", "shuffled", "random"]
LrSchedule = Literal[
    "cosine", "linear", "exponential", "constant", "wsd", "wsd_cosine", "cosine_exponential_mean"
]
Precision = Literal["bf16", "fp32", "tf32", "fp16"]
Strategy = Literal[
    "auto", "ddp", "fsdp",
    "deepspeed_stage_1", "deepspeed_stage_1_offload",
    "deepspeed_stage_2", "deepspeed_stage_2_offload",
    "deepspeed_stage_3", "deepspeed_stage_3_offload",
]  # fmt: skip


@dataclass(frozen=True)
class ModelOptions:
    """Model. With --load_model the file decides every dimension and a flag only confirms it."""

    version: Version | None = None
    """RWKV version: x052 is RWKV-5.2, x060 RWKV-6, x070 RWKV-7 (x070 for a fresh model)."""
    model_config: str = ""
    """Preset: 1.5b, RWKV7-1.5B or a JSON file (rwkvtune configs list). It names the weights unless
    load_model does, its dimensions must be theirs, and its recommended ctx_len, micro_bsz and
    lr_init (and a tenth of it as lr_final) hold where no others are given."""
    load_model: str = ""
    """Weights to start from: an upstream .pth or a .safetensors file; empty = initial values."""
    n_layer: int | None = None
    """Blocks (12 for a fresh model)."""
    n_embd: int | None = None
    """Width of the residual stream (768 for a fresh model)."""
    vocab_size: int | None = None
    """Token ids 0 .. vocab_size - 1 (the data's tokenizer, else 65536, for a fresh model)."""
    head_size: int | None = None
    """Channels per head (64 for a fresh model)."""
    dim_ffn: int | None = None
    """Width of the channel mix (4 * n_embd for a fresh model; x052, x060: 3.5 * n_embd)."""
    mix_rank: int | None = None
    """x060: low-rank width of each mix with the previous token (32 for a fresh model)."""
    decay_rank: int | None = None
    """x060, x070: low-rank width of the decay (x060: 64, x070: train_temp's formula for a fresh
    model)."""
    a_rank: int | None = None
    """x070: low-rank width of the in-context learning rate (train_temp's formula for a fresh
    model)."""
    v_rank: int | None = None
    """x070: low-rank width of the value residual (train_temp's formula for a fresh model)."""
    g_rank: int | None = None
    """x070: low-rank width of the gate (train_temp's formula for a fresh model)."""
    interpolate: bool = False
    """Resize loaded tensors that do not fit the dimensions in the flags, as upstream's stage 1."""
    load_partial: bool = False
    """Initial values for tensors that the weights lack, instead of an error."""
    freeze: str = ""
    """Parameters to leave as they are: patterns on their names, such as emb.*,blocks.[0-3].*"""
    train_only: str = ""
    """The only parameters to train, by such patterns; empty = all."""


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    data_file: str = ""
    """Token file: the prefix of a .bin/.idx pair; or several with their shares of the windows:
    a:0.7,b:0.3."""
    val_data_file: str = ""
    """Token file for validation: another prefix, or several, a,b, whose losses are also told apart
    (a:0.7,b:0.3 weighs them in their mean); empty = no validation."""
    ctx_len: int = 512
    """Tokens per window."""
    order: Order = "published"
    """Order of windows: RWKV-LM's cubic permutation, another seeded shuffle in each pass, or seeded
    random starts (RWKV-LM's stages 0 and 4)."""
    magic_prime: int = 0
    """The published order's prime; 0 = the largest that fits the data."""
    reset_at_documents: bool = False
    """Start each document of a window from a zero state; upstream lets state flow through."""
    tokenizer: str = ""
    """bytes, world, a tokenizer.json or a vocabulary file; empty = the one beside the data. For
    samples and bits per byte."""


@dataclass(frozen=True)
class ScheduleOptions:
    """Length and learning rate. Steps are optimizer steps; tokens are those of all ranks."""

    micro_bsz: int = 8
    """Windows per device and micro-batch."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step."""
    epoch_steps: int = 0
    """Steps per mini-epoch; 0 = as many as epoch_samples needs."""
    epoch_samples: int = 0
    """Windows per mini-epoch, RWKV-LM's has 40320; 0 = one pass over the data."""
    epoch_count: int = 0
    """Mini-epochs to train; 0 = as many as exit_tokens needs; without exit_tokens one, or, with
    epoch_samples, one pass over the data."""
    exit_tokens: int = 0
    """Stop after this many training tokens; the learning rate ends its curve there, even if
    epoch_count stops the run before. 0 = the epochs decide."""
    lr_schedule: LrSchedule = "cosine"
    """Curve from lr_init to lr_final; wsd = plateau, then decay; wsd_cosine = world_train.py's;
    cosine_exponential_mean = RWKV-LM's for negative exit tokens."""
    lr_init: float = 6e-4
    """Highest learning rate."""
    lr_final: float = 6e-5
    """Learning rate at the end."""
    warmup_steps: int = 10
    """Steps of linear warmup from 1 % (0 % for wsd_cosine); -1 = none."""
    restart_warmup_steps: int = 10
    """Steps of warmup when a run goes on from bare weights rwkv-N.pth and warmup_steps is -1."""
    hold_epochs: int = 0
    """linear, exponential: mini-epochs at lr_init before the fall begins."""
    decay_share: float = 0.2
    """wsd: the last share of the run that decays, 0..1."""
    chunk_len: int = 0
    """Tokens through which gradients flow back: longer rows run in pieces that pass their state on,
    in the memory of one piece; 0 = the whole row."""


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer: Adam with decoupled weight decay on the large matrices only."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw = upstream's; adamw8bit keeps its moments in 8 bits; muon = orthogonal updates for the
    matrices of att and ffn, AdamW for the rest."""
    fused_backward: bool = False
    """Move each parameter as soon as its gradient is complete, and drop the gradient: no memory for
    all gradients. Not with grad_clip, accumulation or several devices."""
    beta1: float = 0.9
    """Adam's decay of the gradient's mean, per step."""
    beta2: float = 0.99
    """Adam's decay of the squared gradient's mean, per step."""
    adam_eps: float = 1e-18
    """Added outside the root."""
    weight_decay: float = 0.001
    """Per step, times the learning rate."""
    weight_decay_final: float = -1.0
    """Weight decay at the end, exponentially approached; <= 0 = constant."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    layerwise_lr: bool = True
    """Twice the learning rate for the decays (x070: att.w0, others: att.time_decay), as
    published."""
    stage2_lr: bool = False
    """Five times the learning rate for decays and mixes instead, as RWKV-LM's stage 2."""
    l2wrap: float = 1e-4
    """Pull on each position's largest logit; 0 = off."""
    head_chunk: int = 0
    """Positions whose logits exist at once; 0 = as many as 64 MB (GPU: 256 MB) hold."""


@dataclass(frozen=True)
class AdapterOptions:
    """Adapter: train something small beside the frozen weights of --load_model."""

    peft: Literal["none", "lora", "rslora", "dora", "pissa", "miss", "state"] = "none"
    """What is trained: none = the model itself; LoRA or one of its family on its projections; state
    = the WKV state that every text begins with."""
    lora_r: int | None = None
    """Rank (16); also of miss."""
    lora_alpha: float | None = None
    """The update counts alpha / r, rslora: alpha / sqrt(r) (32; pissa: r)."""
    lora_targets: str = ""
    """Modules to adapt: ends of names with commas, such as att.key,ffn.value, or a regular
    expression for whole names; empty = all projections of att and ffn."""
    train_modules: str = ""
    """Modules trained in full beside it, such as ln1,ln2,ln_x; they are part of the adapter."""
    peft_config: str = ""
    """JSON of further fields of peft's LoraConfig or MissConfig, such as {"lora_dropout": 0.05}."""
    quant: Literal["none", "4bit", "nf4", "fp4", "8bit", "int8"] = "none"
    """Pack the frozen projections: 4bit = nf4, 8bit = int8."""

    def settings(self) -> AdapterSettings | None:
        """None without an adapter.  UserError for what is no JSON."""
        if self.peft == "none":
            return None
        try:
            extra = json.loads(self.peft_config or "{}")
        except ValueError as error:
            raise UserError(f"peft_config={self.peft_config!r} is no JSON: {error}") from None
        if not isinstance(extra, dict):
            raise UserError(f"peft_config={self.peft_config!r} must be a JSON object: {{...}}")
        return AdapterSettings(
            self.peft,
            r=self.lora_r,
            alpha=self.lora_alpha,
            targets=self.lora_targets,
            train_modules=self.train_modules,
            peft_config=extra,
            quant=self.quant,
        )


@dataclass(frozen=True)
class DeviceOptions:
    """Devices."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Kind of device; auto = a GPU that torch sees, else the CPU; gpu = the same, and says so where
    there is none; cuda = a GPU or an error; mps = Apple's."""
    devices: int | Literal["auto"] = "auto"
    """Devices per machine: a number, or auto (all GPUs, one CPU process)."""
    num_nodes: int = 1
    """Machines."""
    strategy: Strategy = "auto"
    """How devices share the work; auto = ddp, the others also shard the model or its optimizer;
    *_offload = what is sharded rests in the machine's memory instead of the GPU's."""
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """What runs strategy=deepspeed_stage_N: torch = its own sharding; deepspeed = DeepSpeed, which
    needs ninja and a C++ compiler; auto = DeepSpeed where it can run, else torch."""
    context_parallel: int = 1
    """Ranks that share each sequence, every one a stretch of it: memory for long ctx_len falls with
    their number."""
    precision: Precision = "bf16"
    """bf16 = bf16 products with fp32 master weights; fp32; tf32 (GPU); fp16 (GPU, loss scaling)."""
    grad_cp: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    kernel: str = "auto"
    """Backend of the recurrence and of the fused pieces around it: auto, triton_gpu, or chunked and
    reference in plain PyTorch."""
    kernel_precision: Literal["default", "high"] = "default"
    """Products inside a GPU's recurrence kernel: default = tf32 for 16-bit inputs; high = as exact
    as fp32, slower. On CPU they are fp32 anyway."""
    working_weights: Literal["auto", "kept", "cast"] = "auto"
    """Matrices in bf16 or fp16: kept = written once per step; cast = made in each micro-batch and
    freed after it, with the same results; auto = kept where a step has several micro-batches, but
    not with grad_cp."""
    compile: bool = False
    """torch.compile each block: a slow first step, minutes on a CPU, for faster ones after it."""
    threads: int = 0
    """CPU threads; 0 = torch's choice. Bits of a CPU run repeat at one thread count."""


@dataclass(frozen=True)
class OutputOptions:
    """Output: one run folder with weights, resume states, logs and pictures."""

    proj_dir: str = "out"
    """The run folder."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto = go on with the run that proj_dir holds; never = refuse a folder that holds one;
    required = refuse one that holds none."""
    init_only: bool = False
    """Write rwkv-init.pth and stop: RWKV-LM's stage 1."""
    random_seed: int = 42
    """Initial weights, shuffled order and samples."""
    epoch_save: int = 1
    """Write rwkv-<epoch>.pth every so many mini-epochs; 0 = only at the end."""
    save_every: int = 0
    """Write a resume state every so many steps, besides those at rwkv-*.pth; 0 = none."""
    keep_last: int = 2
    """Resume states to keep; rwkv-*.pth are never removed."""
    async_save: bool = False
    """Write weights and resume states while training goes on, which then waits only until they are
    copied; the copy takes their size in the machine's memory."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the tensors in rwkv-*.pth; resume states are always fp32."""
    log_every: int = 10
    """Steps per line of metrics.csv and of the console."""
    throughput_log_steps: int = 0
    """Steps per line of samples/s, tokens/s, ms per step and peak memory; 0 = off."""
    log_layers: bool = True
    """Also log gradient norms and decays of each block, every log_every steps, to layers.csv."""
    val_every: int = 0
    """Validate every so many steps; 0 = at the end of each mini-epoch."""
    val_windows: int = 0
    """Windows of validation data to use; 0 = all."""
    sample_every: int = 0
    """Print generated text every so many steps; 0 = never."""
    sample_prompt: str = ""
    """What the samples go on from; empty = the start of a document."""
    sample_tokens: int = 200
    """Length of a sample."""
    tensorboard: bool = False
    """Also write TensorBoard events into proj_dir/tensorboard."""
    wandb: str = ""
    """Also log to this wandb project (WANDB_MODE=offline keeps it local)."""


Config = TypeVar("Config", bound="TrainConfig")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `rwkvtune train` can be told."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    data_file_is: ClassVar[str] = "the prefix of a .bin/.idx pair"

    @property
    def has_validation(self) -> bool:
        return bool(self.data.val_data_file)

    @property
    def has_samples(self) -> bool:
        return bool(self.output.sample_every)

    @classmethod
    def from_flat(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Build one from one flat mapping of field name -> value; UserError for unknown names."""
        parts: dict[str, Any] = {}
        rest = dict(values)
        for group, options in option_groups(cls).items():
            names = [g.name for g in dataclasses.fields(options)]
            parts[group] = options(**{n: rest.pop(n) for n in names if n in rest})
        if rest:
            raise UserError(unknown_settings(rest))
        return cls(**parts)

    def to_flat(self) -> dict[str, Any]:
        """One flat mapping of field name -> value, in the order of this file."""
        groups = (getattr(self, f.name) for f in dataclasses.fields(self))
        return {g.name: getattr(o, g.name) for o in groups for g in dataclasses.fields(o)}

    def problems(self) -> list[str]:
        """All that is wrong with the settings themselves, at once; files are not looked at."""
        flat = self.to_flat()
        found = [
            f"{name}={flat[name]!r} must be {expected(hint)}"
            for name, hint in setting_types(type(self)).items()
            if not fits(flat[name], hint)
        ]
        if found:  # the rest compares numbers
            return found
        if not self.data.data_file:
            found.append(f"data_file is missing: give {self.data_file_is}")
        found += [
            f"{name}={flat[name]} must be at least {least}"
            for name, least in _AT_LEAST.items()
            if isinstance(flat.get(name), int) and flat[name] < least
        ]
        found += [
            f"{name}={flat[name]} must be a number from 0 up"
            for name in _NOT_NEGATIVE
            if not (0 <= flat[name] < math.inf)
        ]
        found += [
            f"{name}={flat[name]} must be in [0, 1)"
            for name in ("beta1", "beta2")
            if not 0 <= flat[name] < 1
        ]
        if flat["epoch_steps"] and flat["epoch_samples"]:
            found.append(
                f"epoch_steps={flat['epoch_steps']} and epoch_samples={flat['epoch_samples']} both "
                "say how long a mini-epoch is: leave one out"
            )
        if not 0 < flat["decay_share"] <= 1:
            found.append(f"decay_share={flat['decay_share']} must be in (0, 1]")
        if not -math.inf < flat["weight_decay_final"] < math.inf:
            found.append(f"weight_decay_final={flat['weight_decay_final']} must be a number")
        if not -(2**63) <= flat["random_seed"] < 2**63:
            found.append(f"random_seed={flat['random_seed']} must fit into 64 bits")
        return found + self._optimizer_problems() + self._adapter_problems()

    def _optimizer_problems(self) -> list[str]:
        """Why fused_backward cannot be had with the other settings."""
        if not self.optimizer.fused_backward:
            return []
        chunk = self.schedule.chunk_len
        reasons = {
            f"grad_clip={self.optimizer.grad_clip:g} needs the norm of all gradients before any "
            "parameter moves: give --grad_clip 0": self.optimizer.grad_clip > 0,
            "accumulate_grad_batches adds up several gradients first": (
                self.schedule.accumulate_grad_batches > 1
            ),
            f"chunk_len={chunk} adds up the gradients of several pieces first": (
                0 < chunk < self.data.ctx_len
            ),
            "precision=fp16 looks at all gradients for overflow first": (
                self.device.precision == "fp16"
            ),
        }
        return [f"fused_backward: {reason}" for reason, holds in reasons.items() if holds]

    def _adapter_problems(self) -> list[str]:
        flat = self.to_flat()
        settings = self.adapter.settings()
        if settings is None:
            names = ("lora_r", "lora_alpha", "lora_targets", "train_modules", "peft_config")
            found = [
                f"{n}={flat[n]!r} needs an adapter: give --peft lora" for n in names if flat[n]
            ]
            if self.adapter.quant != "none":
                found.append(
                    f"quant={self.adapter.quant} packs weights that are not trained: give --peft "
                    "lora (or another one) to train beside them"
                )
            return found
        found = settings.problems()
        if not (self.model.load_model or self.model.model_config):
            found.append(
                f"load_model is missing: peft={settings.kind} is trained beside the weights of a "
                "model, give its .pth or .safetensors file"
            )
        for name in ("freeze", "train_only", "interpolate", "load_partial", "init_only"):
            if flat[name]:
                found.append(
                    f"{name}={flat[name]!r} is for training a model itself; with peft="
                    f"{settings.kind} the adapter is what is trained"
                )
        if settings.kind == "state" and self.joins_documents:
            found.append(f"peft=state with {self.joins_documents}")
        return found

    @property
    def joins_documents(self) -> str:
        """What lets documents start inside a row, from a state of zero, and how not to; empty when
        nothing does."""
        if not self.data.reset_at_documents:
            return ""
        return (
            "reset_at_documents: a document that starts inside a window would begin from zero, not "
            "from the trained state; leave it out"
        )

    @property
    def keeps_working_weights(self) -> bool:
        """Whether copies of the matrices live from one micro-batch to the next, as far as settings
        tell: sharded weights have none."""
        d, s = self.device, self.schedule
        if d.precision not in ("bf16", "fp16") or self.adapter.peft != "none":
            return False
        several = s.accumulate_grad_batches > 1 or 0 < s.chunk_len < self.data.ctx_len
        pays = several and not d.grad_cp  # which gives time for memory
        return d.working_weights == "kept" or (d.working_weights == "auto" and pays)

    def without_effect(self) -> list[str]:
        """A line for each setting that was changed although the others give it nothing to do."""
        now, default = self.to_flat(), type(self)().to_flat()
        falls_by_steps = ("linear", "exponential", "cosine_exponential_mean")
        rules = (
            (("interpolate", "load_partial"), not now["load_model"], "without load_model"),
            (("val_every", "val_windows"), not self.has_validation, "without val_data_file"),
            (("sample_prompt", "sample_tokens"), not self.has_samples, "without sample_every"),
            (
                ("lr_final",),
                now["lr_schedule"] in ("constant", "wsd_cosine"),
                f"with lr_schedule={now['lr_schedule']}",
            ),
            (("decay_share",), now["lr_schedule"] != "wsd", "without lr_schedule=wsd"),
            (
                ("hold_epochs",),
                now["lr_schedule"] not in falls_by_steps,
                f"with lr_schedule={now['lr_schedule']}",
            ),
            (
                ("engine",),
                not now["strategy"].startswith("deepspeed"),
                f"with strategy={now['strategy']}",
            ),
            (("stage2_lr",), not now["layerwise_lr"], "with layerwise_lr=false"),
            (
                ("working_weights",),
                now["precision"] in ("fp32", "tf32"),
                f"with precision={now['precision']}",
            ),
            (("working_weights",), now["peft"] != "none", "with an adapter"),
        )
        found = []
        if now["fused_backward"] and now["log_layers"]:
            found.append("log_layers does nothing with fused_backward, which keeps no gradients")
        if now["optimizer"] == "adamw8bit" and now["adam_eps"] < EPS_8BIT:
            found.append(
                f"adam_eps={now['adam_eps']:g} counts as {EPS_8BIT:g} with optimizer=adamw8bit: a "
                "second moment that 8 bits round to zero would else be divided by"
            )
        return found + [
            f"{name}={now[name]!r} does nothing {why}"
            for names, is_idle, why in rules
            for name in names
            if is_idle and now[name] != default[name]
        ]


EPS_8BIT = 1e-8
"""Least eps of adamw8bit."""

_AT_LEAST = {
    **dict.fromkeys(("ctx_len", "micro_bsz", "accumulate_grad_batches"), 1),
    **dict.fromkeys(("devices", "num_nodes", "context_parallel", "keep_last", "log_every"), 1),
    **dict.fromkeys(("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn"), 1),
    **dict.fromkeys(("mix_rank", "decay_rank", "a_rank", "v_rank", "g_rank"), 1),
    **dict.fromkeys(("epoch_steps", "epoch_count", "exit_tokens", "magic_prime"), 0),
    **dict.fromkeys(("epoch_samples", "hold_epochs", "restart_warmup_steps"), 0),
    **dict.fromkeys(("epoch_save", "save_every", "val_every", "val_windows"), 0),
    **dict.fromkeys(("sample_every", "sample_tokens", "head_chunk", "threads"), 0),
    "chunk_len": 0,
    "throughput_log_steps": 0,
    "warmup_steps": -1,
}
_NOT_NEGATIVE = ("lr_init", "lr_final", "weight_decay", "adam_eps", "grad_clip", "l2wrap")


def option_groups(config_class: type[TrainConfig] = TrainConfig) -> dict[str, type]:
    """The dataclasses whose fields are the settings of a run, by the name of the group."""
    return {f.name: f.default_factory for f in dataclasses.fields(config_class)}  # type: ignore[misc]


MAY_CHANGE_AT_RESUME = frozenset(
    {
        *("epoch_count", "exit_tokens", "micro_bsz", "accumulate_grad_batches"),
        *("accelerator", "devices", "num_nodes", "strategy", "engine"),
        *("context_parallel", "threads"),
        *("epoch_save", "save_every", "keep_last", "log_every", "val_every", "sample_every"),
        # What a preset stands for is compared by itself.
        *("async_save", "log_layers", "model_config", "throughput_log_steps"),
        *("working_weights", "compile"),
        *("tensorboard", "wandb", "resume", "proj_dir", "epoch_samples", "restart_warmup_steps"),
    }
)
"""Settings that may differ from the interrupted run's; micro_bsz and accumulation only at one
global batch size, which is compared too."""

CONTENT_OF = {"data_file": "data", "val_data_file": "val_data"}
"""Settings that may be another path to the same content -> what a run records of that content."""


def changes_refused(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: TrainConfig
) -> list[str]:
    """The settings that differ between an interrupted run and this one although they must not.

    A setting that the interrupted run's version did not know counts as left at its default; what
    else it did not record is not compared.
    """
    before = defaults.to_flat() | dict(before)
    moved = [
        path
        for path, content in CONTENT_OF.items()
        if content in before and before[content] == now[content]
    ]
    return [
        f"{name}: {before[name]!r} -> {now[name]!r}"
        for name in now
        if name in before and before[name] != now[name]
        if name not in MAY_CHANGE_AT_RESUME and name not in moved
    ]


def setting_types(config_class: type[TrainConfig] = TrainConfig) -> dict[str, Any]:
    """The type of every setting by its name."""
    groups = option_groups(config_class)
    hints = {name: get_type_hints(options) for name, options in groups.items()}
    return {name: hint for group in hints.values() for name, hint in group.items()}


def expected(hint: Any) -> str:
    """A setting's type in words, such as "a whole number or auto"."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return str(choices[0]) if len(choices) == 1 else f"one of {', '.join(choices)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    parts = get_args(hint) or (hint,)
    return " or ".join(words.get(part) or expected(part) for part in parts if part is not NoneType)


def fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if get_args(hint):
        return any(fits(value, part) for part in get_args(hint))
    return isinstance(value, int | float if hint is float else hint)


def unknown_settings(
    names: Iterable[str], *, known: Collection[str] = (), command: str = "rwkvtune train"
) -> str:
    """The message about names that are no settings, with the nearest real one to each.

    known: all names that there are; none = the settings.
    """
    known = known or setting_types()
    near = {name: difflib.get_close_matches(name, known, n=1) for name in names}
    hints = [f"{name} (did you mean {m[0]}?)" if m else name for name, m in near.items()]
    return f"unknown settings: {', '.join(hints)}; `{command} --help` lists all"
