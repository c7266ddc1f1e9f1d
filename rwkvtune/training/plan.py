"""What a run will be, worked out before anything long starts."""

from __future__ import annotations

from dataclasses import dataclass

from rwkvtune.errors import UserError
from rwkvtune.kernels.fused.cross_entropy import rows_at_once
from rwkvtune.models import ModelConfig
from rwkvtune.training.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. A step is an optimizer step; tokens and samples are those of all ranks."""

    world_size: int
    """Ranks with windows of their own: all, or, where ranks share each window, their groups."""
    micro_bsz: int
    accumulate: int
    ctx_len: int
    epoch_steps: int
    epoch_schedule_steps: int
    """Length that the mini-epochs alone give; total_steps may be less because of exit_tokens."""
    total_steps: int
    context_parallel: int = 1
    """Ranks that share each window."""

    @property
    def global_bsz(self) -> int:
        """Windows per step."""
        return self.world_size * self.micro_bsz * self.accumulate

    @property
    def tokens_per_step(self) -> int:
        return self.global_bsz * self.ctx_len


def make_plan(config: TrainConfig, *, world_size: int, num_slots: int, row_tokens: int = 0) -> Plan:
    """Work out steps and epochs.

    num_slots: windows in one pass over the data.  row_tokens: tokens of a window; 0 = ctx_len.
    Raises UserError when a pass is shorter than one step and nothing says how long the run should
    be.
    """
    s = config.schedule
    replicas = replicas_of(config, world_size)
    global_bsz = replicas * s.micro_bsz * s.accumulate_grad_batches
    row_tokens = row_tokens or config.data.ctx_len
    tokens_per_step = global_bsz * row_tokens
    pass_steps = num_slots // global_bsz
    epoch_steps = s.epoch_steps or s.epoch_samples // global_bsz or pass_steps
    if 0 < s.epoch_samples < global_bsz:
        raise UserError(
            f"epoch_samples={s.epoch_samples} is less than one step of {global_bsz} windows: use a "
            "smaller batch or a longer mini-epoch"
        )
    length_is_open = not (s.exit_tokens or s.epoch_count or s.epoch_steps)
    if epoch_steps == 0 or (length_is_open and pass_steps == 0):
        raise UserError(
            f"one pass over this data is {num_slots} windows of {config.data.ctx_len} tokens, less "
            f"than one step of {global_bsz} (micro_bsz {s.micro_bsz} x accumulate_grad_batches "
            f"{s.accumulate_grad_batches} x {replicas} devices): use a smaller batch or ctx_len, "
            "or set epoch_steps to go over it several times"
        )
    by_tokens = -(-s.exit_tokens // tokens_per_step)
    by_epochs = s.epoch_count * epoch_steps
    # What the data decides: one pass, as upstream in whole mini-epochs where there are any.
    one_pass = num_slots // s.epoch_samples * epoch_steps if s.epoch_samples else epoch_steps
    total_steps = min((n for n in (by_tokens, by_epochs) if n), default=one_pass or pass_steps)
    return Plan(
        replicas,
        s.micro_bsz,
        s.accumulate_grad_batches,
        row_tokens,
        epoch_steps,
        by_epochs or one_pass or pass_steps,
        total_steps,
        config.device.context_parallel,
    )


def replicas_of(config: TrainConfig, world_size: int) -> int:
    """Groups of ranks that train on windows of their own; UserError where ranks are left over."""
    size = config.device.context_parallel
    if world_size % size:
        raise UserError(
            f"context_parallel={size} does not divide the {world_size} processes of this run: "
            "give --devices (times --num_nodes) a multiple of it"
        )
    return world_size // size


KEPT_PER_BLOCK = {"x052": 18, "x060": 27, "x070": 28}
"""Tensors of the width of the model that a block keeps for its backward pass, per token."""


MOMENTS = {"adamw": 8, "adamw8bit": 2, "muon": 4}
"""Bytes that an optimizer keeps for a trained number."""


def memory_estimate(
    model: ModelConfig,
    config: TrainConfig,
    device_type: str,
    *,
    world_size: int = 1,
    trained: int | None = None,
    frozen_bytes: int = 0,
) -> int:
    """Bytes that training adds to one of world_size devices: the sum of `memory_parts`."""
    parts = memory_parts(
        model,
        config,
        device_type,
        world_size=world_size,
        trained=trained,
        frozen_bytes=frozen_bytes,
    )
    return sum(parts.values())


def memory_parts(
    model: ModelConfig,
    config: TrainConfig,
    device_type: str,
    *,
    world_size: int = 1,
    trained: int | None = None,
    frozen_bytes: int = 0,
) -> dict[str, int]:
    """Bytes that training adds to one device, by what they are for: weights, gradients, moments
    (the optimizer's), gathered (what a sharded model holds whole for a while), activations, head.

    trained: numbers that are; None = the whole model.  frozen_bytes: of all other weights.

    Activations are counted per token and layer from what the blocks keep for their backward pass
    (see the fused pieces in kernels/), in the compute type; with grad_cp only block inputs stay. On
    a CPU the heap holds more than is alive: freed blocks are kept (see training/memory.py), and
    aligned ones fit each other badly. What it comes to was fitted to 17 runs of x070 with 2 to 24
    layers, and corrected by 14 of x052 and x060; benchmarks/run.py compares it with what runs use.
    """
    is_half = config.device.precision in ("bf16", "fp16")
    size = 2 if is_half else 4
    C = model.n_embd
    length = min(config.schedule.chunk_len or config.data.ctx_len, config.data.ctx_len)
    length = -(-length // config.device.context_parallel)
    tokens = config.schedule.micro_bsz * length
    rows = config.optimizer.head_chunk or rows_at_once(model.vocab_size, device_type)
    head = min(rows, tokens) * model.vocab_size * size + model.vocab_size * C * 4
    o = config.optimizer
    trained = model.num_parameters if trained is None else trained
    weights, gradients = frozen_bytes + trained * 4, trained * 4 * (not o.fused_backward)
    moments, gathered = trained * MOMENTS[o.optimizer], 0
    is_sharded = world_size > 1 and config.device.strategy not in ("auto", "ddp")
    if is_sharded:
        outside = 2 * model.vocab_size * C  # embedding and head stay whole while a step runs
        block = (model.num_parameters - outside) // model.n_layer
        whole = outside + block * (
            model.n_layer if config.device.strategy.startswith("deepspeed_stage_1") else 2
        )
        # Gradients of the part that stays whole are whole too until they are added up, and all are
        # from one micro-batch to the next.
        is_accumulated = config.schedule.accumulate_grad_batches > 1
        gathered = whole * 4 + (0 if is_accumulated else (outside + block) * 4)
        if device_type == "cpu":
            # Its heap keeps the whole model that each process begins with, and the buffers in which
            # pieces arrive: within 6 % of three runs of L6 D512 on 2 and 4 processes.
            gathered = 2 * gathered + 4 * model.num_parameters
        weights, moments = weights // world_size, moments // world_size
        gradients = (
            gradients + gradients // world_size if is_accumulated else (gradients // world_size)
        )
    if config.keeps_working_weights and config.device.grad_cp:
        weights += size * trained  # without grad_cp the backward pass keeps them anyway
    activations = activation_bytes(
        model, tokens, is_half=is_half, grad_cp=config.device.grad_cp, on_cpu=device_type == "cpu"
    )
    return {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "gathered": gathered,
        "activations": int(activations),
        "head": head,
    }


def activation_bytes(
    model: ModelConfig, tokens: int, *, is_half: bool, grad_cp: bool, on_cpu: bool
) -> float:
    """What the blocks keep for their backward pass on so many tokens at once."""
    size = 2 if is_half else 4
    L, C = model.n_layer, model.n_embd
    widths = KEPT_PER_BLOCK[model.version] * C + 2 * model.dim_ffn
    residual = tokens * C * 4 * 2
    block = tokens * (widths * size + 2 * C * 4)
    if not on_cpu:
        blocks = 2.0 if grad_cp else 1.0 + L
    elif grad_cp:
        blocks = 2.6 + 0.1 * L if is_half else 1.4 + 0.35 * L
    else:
        blocks = 1.5 + 1.33 * L if is_half else 1.0 + 1.15 * L
    return blocks * block + (residual * L if grad_cp else 0)
