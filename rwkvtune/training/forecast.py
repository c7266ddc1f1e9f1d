"""What a run would need on devices that are not here: memory by part, tokens per second, traffic
between the devices, days."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkvtune.errors import UserError
from rwkvtune.models import CONFIG_CLASSES, ModelConfig
from rwkvtune.training.config import Strategy, TrainConfig
from rwkvtune.training.plan import memory_parts, replicas_of

COMPARED: tuple[Strategy, ...] = ("ddp", "deepspeed_stage_1", "fsdp")
"""Strategies that differ in what they keep and send; stages 2 and 3 are fsdp on torch's engine."""


@dataclass(frozen=True)
class Device:
    name: str
    memory: int
    """Bytes; 0 = not known."""
    measured: tuple[Mapping[str, Any], ...]
    """Steps that were timed: the model, the batch, tokens_per_s of one device, origin."""


def devices() -> dict[str, Device]:
    """The devices that are known, by name. Memory as their makers state it."""
    content = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    return {
        name: Device(name, round(d["memory_gb"] * 10**9), tuple(d["measured"]))
        for name, d in content.items()
    }


@dataclass(frozen=True)
class StrategyForecast:
    strategy: str
    memory: dict[str, int]
    """Bytes on each device, by part."""
    sent_per_step: int
    """Bytes that each device sends in a step."""


def forecast(
    model: ModelConfig, config: TrainConfig, *, count: int, kind: str
) -> list[StrategyForecast]:
    """One for each strategy of COMPARED, on `count` devices.

    kind: cpu or cuda.
    """
    found = []
    for strategy in COMPARED if count > 1 else COMPARED[:1]:
        device = replace(config.device, strategy=strategy)
        as_wanted = replace(config, device=device)
        parts = memory_parts(model, as_wanted, kind, world_size=count)
        found.append(StrategyForecast(strategy, parts, sent_per_step(model, as_wanted, count)))
    return found


def sent_per_step(model: ModelConfig, config: TrainConfig, count: int) -> int:
    """Bytes that each of `count` devices sends in an optimizer step, fp32 as we send them.

    A ring of N devices passes (N - 1) / N of a tensor for a gathering or a scattered sum, and twice
    that for a sum that all get. Sharded weights are gathered for each micro-batch, in the backward
    pass again unless they stay gathered; gradients travel once a step. With context_parallel, each
    block of a micro-batch exchanges two maps of its states each way, and two tokens.
    """
    if count == 1:
        return 0
    accumulate = config.schedule.accumulate_grad_batches
    share = (count - 1) / count * 4 * model.num_parameters
    gatherings = {"ddp": 0, "auto": 0, "deepspeed_stage_1": 1}.get(config.device.strategy, 2)
    times_passed = 2 if gatherings == 0 else 1 + gatherings * accumulate
    return int(share * times_passed) + _sent_for_sequences(model, config)


def _sent_for_sequences(model: ModelConfig, config: TrainConfig) -> int:
    ranks = config.device.context_parallel
    if ranks == 1:
        return 0
    rows, H, N = config.schedule.micro_bsz, model.num_heads, model.head_size
    maps = 4 * (ranks - 1) * rows * H * N * N * 4
    size = 2 if config.device.precision in ("bf16", "fp16") else 4
    tokens = 4 * rows * model.n_embd * size
    return model.n_layer * config.schedule.accumulate_grad_batches * (maps + tokens)


def flops_per_token(model: ModelConfig, *, grad_cp: bool) -> float:
    """Of the matrix products of a training step: 6 for each weight that takes part in one, 8 where
    blocks are recomputed."""
    head = model.vocab_size * model.n_embd
    return (8 if grad_cp else 6) * (model.matmul_parameters - head) + 6 * head


def tokens_per_second(
    device: Device, model: ModelConfig, config: TrainConfig
) -> tuple[float, Mapping[str, Any]] | None:
    """(of one device, the measured step that it follows from); None where nothing was measured in
    this precision."""
    known = [m for m in device.measured if m["precision"] == config.device.precision]
    if not known:
        return None

    def of(step: Mapping[str, Any]) -> ModelConfig:
        sizes = {n: step[n] for n in ("n_layer", "n_embd", "vocab_size")}
        return CONFIG_CLASSES[step["version"]](**sizes)

    nearest = min(known, key=lambda m: abs(m["n_embd"] - model.n_embd))
    flops = nearest["tokens_per_s"] * flops_per_token(of(nearest), grad_cp=False)
    return flops / flops_per_token(model, grad_cp=config.device.grad_cp), nearest


def check_count(config: TrainConfig, count: int) -> None:
    """UserError for a number of devices that the settings do not allow."""
    if count < 1:
        raise UserError(f"gpus={count} must be at least 1")
    replicas_of(config, count)
