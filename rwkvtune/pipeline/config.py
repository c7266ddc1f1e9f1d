"""The settings of a sequence training, under their published names and with their published
defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from rwkvtune.errors import UserError
from rwkvtune.training.config import TrainConfig, unknown_settings

MODEL_TYPES = ("x052", "x060", "x070")


@dataclass
class ModelConfig:
    """The model."""

    model_type: str = "x060"
    """RWKV version: x052, x060 or x070."""
    n_layer: int = 3
    """Blocks."""
    n_embd: int = 128
    """Width of the residual stream, a multiple of head_size_a."""
    ctx_len: int = 1024
    """Tokens per window."""
    vocab_size: int = 361
    """Rows of the embedding; left at 361, or below, it becomes the tokenizer's."""
    head_size_a: int = 64
    """Channels per head."""

    def __post_init__(self) -> None:
        _plain_numbers(self)
        if self.model_type not in MODEL_TYPES:
            raise UserError(
                f"ModelConfig: model_type={self.model_type!r} must be one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        flat = {"data_file": "-", **self.settings()}
        del flat["version"]  # it may be one that only other versions of the trainer know
        problems = TrainConfig.from_flat(flat).problems()
        _raise("ModelConfig", (p.replace("head_size=", "head_size_a=") for p in problems))
        if self.n_embd % self.head_size_a:
            raise UserError(
                f"ModelConfig: n_embd={self.n_embd} is not a multiple of "
                f"head_size_a={self.head_size_a}: choose another of the two"
            )

    def settings(self) -> dict[str, Any]:
        """As the trainer calls them."""
        return {
            "version": self.model_type,
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
            "ctx_len": self.ctx_len,
            "vocab_size": self.vocab_size,
            "head_size": self.head_size_a,
        }


@dataclass
class TrainingConfig:
    """How to train."""

    lr_init: float = 6e-4
    """Highest learning rate."""
    lr_final: float = 6e-5
    """Learning rate at the end."""
    warmup_steps: int = 10
    """Optimizer steps of linear warmup."""
    beta1: float = 0.9
    """Adam's decay of the gradient's mean, per step."""
    beta2: float = 0.99
    """Adam's decay of the squared gradient's mean, per step."""
    adam_eps: float = 1e-18
    """Added outside the root."""
    weight_decay: float = 0.001
    """Per step, times the learning rate; on the large matrices only."""
    micro_bsz: int = 16
    """Windows per device and micro-batch; less where the batches of an epoch come out even."""
    grad_cp: int = 1
    """1 = recompute each block in the backward pass: less memory, about a third more time."""
    epoch_save: int = 1
    """Write rwkv-<epoch>.pth every so many epochs; 0 = only at the end."""
    precision: str = "bf16"
    """bf16 = bf16 products with fp32 master weights; fp16 (GPU only); fp32."""
    strategy: str = "auto"
    """How devices share the work: auto = ddp, fsdp, deepspeed_stage_1, _2, _3."""
    devices: int | Literal["auto"] = 1
    """Devices of this machine: a number, or auto = all GPUs."""
    num_nodes: int = 1
    """Machines."""
    accelerator: str = "auto"
    """auto, cpu, gpu, cuda or mps."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step."""
    lr_schedule: str = "cosine"
    """Curve from lr_init to lr_final; see `rwkvtune train --help`."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    reset_at_documents: bool = False
    """Start each sequence from a zero state; upstream lets state flow through."""

    def __post_init__(self) -> None:
        _plain_numbers(self)
        if self.grad_cp not in (0, 1):
            raise UserError(f"TrainingConfig: grad_cp={self.grad_cp!r} must be 0 or 1")
        flat = {"data_file": "-", **self.settings()}
        _raise("TrainingConfig", TrainConfig.from_flat(flat).problems())

    def settings(self) -> dict[str, Any]:
        """As the trainer calls them."""
        return {**dataclasses.asdict(self), "grad_cp": bool(self.grad_cp)}


@dataclass
class DataConfig:
    """The data."""

    sequence_length: int = 1024
    """1-D arrays are cut into sequences of so many values."""
    n_epochs_duplication: int = 1
    """How often each sequence is written into the token files; an epoch is a pass over all of
    them."""
    val_share: float = 0.0
    """Share of the sequences, 0 to below 1, that is kept for validation and not trained on."""

    def __post_init__(self) -> None:
        _plain_numbers(self)
        found = [
            f"{name}={value!r} must be a whole number from 1 up"
            for name, value in dataclasses.asdict(self).items()
            if name != "val_share" and (type(value) is not int or value < 1)
        ]
        if not isinstance(self.val_share, int | float) or not 0 <= self.val_share < 1:
            found.append(f"val_share={self.val_share!r} must be a share from 0 to below 1")
        _raise("DataConfig", found)


Config = TypeVar("Config", ModelConfig, TrainingConfig, DataConfig)


def checked(kind: type[Config], config: Config) -> Config:
    """A copy whose values are right, however it was changed after it was made; UserError for
    something of another kind."""
    if not isinstance(config, kind):
        raise UserError(
            f"{type(config).__name__} {str(config)[:60]} given where a {kind.__name__} is expected"
        )
    return dataclasses.replace(config)


def config_from_json(kind: type[Config], content: Any, where: str) -> Config:
    """A config that was stored; UserError that names the file when it does not fit."""
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(content, Mapping) or not set(content) <= set(names):
        raise UserError(f"{where}: {str(content)[:80]} is no {kind.__name__} ({', '.join(names)})")
    try:
        return kind(**content)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def overridden(
    model: ModelConfig, training: TrainingConfig, values: Mapping[str, Any]
) -> tuple[ModelConfig, TrainingConfig]:
    """Both with some fields set to other values; UserError for a name that neither has."""
    of_model = {f.name for f in dataclasses.fields(model)}
    of_training = {f.name for f in dataclasses.fields(training)}
    unknown = [name for name in values if name not in of_model | of_training]
    if unknown:
        message = unknown_settings(unknown, known=sorted(of_model | of_training)).partition(";")[0]
        raise UserError(
            f"override_config: {message}; there are {', '.join(sorted(of_model | of_training))}"
        )
    return (
        dataclasses.replace(model, **{n: v for n, v in values.items() if n in of_model}),
        dataclasses.replace(training, **{n: v for n, v in values.items() if n in of_training}),
    )


def _plain_numbers(config: Any) -> None:
    """numpy's numbers as Python's, which JSON can hold."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, np.generic):
            setattr(config, f.name, value.item())


def _raise(name: str, problems: Iterable[str]) -> None:
    if found := "; ".join(problems):
        raise UserError(f"{name}: {found}")
