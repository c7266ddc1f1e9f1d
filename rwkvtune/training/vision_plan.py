"""What a vision run will be, worked out before anything long starts: steps, tokens, memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rwkvtune.adapters.adapter import Sizes
from rwkvtune.data.visual import LENGTH_MULTIPLE
from rwkvtune.errors import UserError
from rwkvtune.models import ModelConfig
from rwkvtune.models.vision.config import AdapterConfig
from rwkvtune.training.plan import Plan, activation_bytes
from rwkvtune.training.vision_config import VisionConfig

PACKED_BYTES = {"nf4": 0.5625, "4bit": 0.5625, "fp4": 0.5625, "int8": 1.0, "8bit": 1.0}
"""Per packed value, with its share of the scales: 4 bits and an fp32 scale per 64; 8 bits."""


@dataclass(frozen=True)
class VisionSizes:
    """What the memory of a run depends on."""

    llm: ModelConfig
    adapter: AdapterConfig
    encoder_parameters: int
    picture_values: int
    """3 x height x width."""
    longest: int
    """Tokens of the longest sample."""
    label_tokens: float
    """Mean per sample."""
    adapted: Sizes | None = None
    """Of the language model with what --peft adds to it; None = nothing is added."""


def make_plan(
    config: VisionConfig, *, world_size: int, num_samples: int, tokens_per_sample: float
) -> tuple[Plan, list[str]]:
    """Steps of the run, and lines about what did not come out even.

    Published mini-epochs count micro-batches over all devices; a step here is an optimizer step.
    """
    notes = []
    devices_bsz = config.micro_bsz * world_size
    accumulate = config.accumulate_grad_batches
    if config.global_bsz:
        accumulate = config.global_bsz // devices_bsz
        if accumulate * devices_bsz != config.global_bsz:
            raise UserError(
                f"global_bsz={config.global_bsz} is no multiple of micro_bsz {config.micro_bsz} x "
                f"{world_size} devices = {devices_bsz}: choose another micro_bsz"
            )
    global_bsz = devices_bsz * accumulate
    per_step = world_size * accumulate
    if config.epoch_steps:
        epoch_steps, left = divmod(config.epoch_steps, per_step)
        if not epoch_steps:
            raise UserError(
                f"epoch_steps={config.epoch_steps} counts micro-batches over all devices, and one "
                f"optimizer step takes {per_step} ({world_size} devices x {accumulate} "
                "accumulated): give at least as many"
            )
        if left:
            notes.append(
                f"epoch_steps={config.epoch_steps} is no multiple of the {per_step} micro-batches "
                f"of a step: {left} are left out of each mini-epoch"
            )
    else:
        epoch_steps = max(1, num_samples // global_bsz)
    total = config.epoch_count * epoch_steps
    row_tokens = max(1, round(tokens_per_sample))
    plan = Plan(world_size, config.micro_bsz, accumulate, row_tokens, epoch_steps, total, total)
    return plan, notes


def memory_estimate(config: VisionConfig, sizes: VisionSizes, device_type: str) -> int:
    """Bytes that training adds to one device: weights, what is trained with its gradients and
    Adam's moments, activations of a micro-batch of the longest samples."""
    is_half, parts = config.precision in ("bf16", "fp16"), config.parts
    size = 2 if is_half else 4
    m = sizes.llm
    projections = m.n_layer * (4 * m.n_embd**2 + 2 * m.n_embd * m.dim_ffn)
    if sizes.adapted is not None:
        llm = sizes.adapted.trained * 16.0 + sizes.adapted.frozen_bytes
    elif "rwkv" in parts:
        llm = m.num_parameters * 16.0
    else:
        head = m.vocab_size * m.n_embd
        packed = PACKED_BYTES.get(config.quant, size)
        llm = projections * packed + head * size + (m.num_parameters - projections - head) * 4
    encoder = sizes.encoder_parameters * (16 if "encoder" in parts else size)
    length = -(-min(sizes.longest, config.ctx_len) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens = config.micro_bsz * length
    activations = activation_bytes(
        m, tokens, is_half=is_half, grad_cp=config.grad_cp, on_cpu=device_type == "cpu"
    )
    labels = sizes.label_tokens * config.micro_bsz
    logits = min(labels * m.vocab_size, 2**25) * size
    adapter = (
        sizes.adapter.num_parameters * 16 + tokens * (sizes.adapter.hidden + 3 * m.n_embd) * size
    )
    pictures = config.micro_bsz * sizes.picture_values * 3
    return int(llm + encoder + adapter + activations + logits + pictures)


def largest_fitting(
    config: VisionConfig, plan: Plan, sizes: VisionSizes, device_type: str, available: int
) -> tuple[int, int, int] | None:
    """(micro_bsz, accumulate_grad_batches, bytes) that keep the global batch and fit; None when not
    even one sample at a time does."""
    per_device = plan.micro_bsz * plan.accumulate
    for micro_bsz in range(plan.micro_bsz, 0, -1):
        if per_device % micro_bsz:
            continue
        smaller = dataclasses.replace(config, micro_bsz=micro_bsz)
        needed = memory_estimate(smaller, sizes, device_type)
        if needed <= available:
            return micro_bsz, per_device // micro_bsz, needed
    return None
