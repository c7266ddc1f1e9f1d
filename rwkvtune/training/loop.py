"""The training loop: the only one. What differs between tasks is the recipe that it is given."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rwkvtune.checkpoint import prune_resume_states, whole
from rwkvtune.errors import UserError
from rwkvtune.kernels.split import split_over
from rwkvtune.kernels.working_weights import write_copies
from rwkvtune.training.config import OptimizerOptions, OutputOptions
from rwkvtune.training.fabric import sequence_group
from rwkvtune.training.layer_stats import layer_statistics
from rwkvtune.training.log import RunLog
from rwkvtune.training.optim import set_hyperparameters
from rwkvtune.training.plan import Plan
from rwkvtune.training.run_state import Progress, RunState
from rwkvtune.training.schedule import Schedule
from rwkvtune.training.throughput import Throughput


class MicroBatch(Protocol):
    """What the loop knows of a batch."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def target_tokens(self) -> int: ...

    @property
    def counts(self) -> tuple[int, int, int]:
        """(rows, tokens, those of them that stand for pictures)."""

    def to(self, device: torch.device | str) -> Any: ...


class Recipe(Protocol):
    """A task: which batches, which loss. The loop knows nothing else about it."""

    def batches(self, progress: Progress) -> Iterator[Sequence[MicroBatch]]:
        """This rank's micro-batches of each step, from the present step on."""

    def loss(
        self, model: nn.Module, batch: Any, carry: Any
    ) -> tuple[Tensor, int, Any, dict[str, float]]:
        """(sum of losses over the targets, number of targets, detached state for the next
        micro-batch, metrics)."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Columns val_* of the log; empty when there is no validation data."""

    def sample(self, model: nn.Module, step: int) -> str | None:
        """Text (or what takes its place) that the model makes now; None when the task has none."""

    def state_dict(self) -> dict[str, Any]:
        """What the recipe must find again at resume, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Stopped:
    """Why fit returned before the end, and with which exit code the process should leave."""

    signal_name: str
    exit_code: int


def fit(
    fabric: Any,
    state: RunState,
    recipe: Recipe,
    plan: Plan,
    schedule: Schedule,
    optimizer_options: OptimizerOptions,
    output: OutputOptions,
    log: RunLog,
) -> Stopped | None:
    """Train from state.progress to plan.total_steps; returns None there, or why it stopped early.

    Every step: fetch, loss, backward, clip, check, move, log, save. The loss is a sum; it is
    divided by the number of targets of all micro-batches and ranks, so neither accumulation nor
    padding changes what a step means.
    UserError when loss or gradient norm is not finite, before the optimizer has moved.
    """
    model, optimizer, progress = state.model, state.optimizer, state.progress
    folder = Path(output.proj_dir)
    first_epoch = progress.restart_step // plan.epoch_steps
    # Not those of the model: sharded ones outside its blocks stay gathered after a validation.
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    group = sequence_group(fabric, plan.context_parallel)
    in_backward, zero = optimizer_options.fused_backward, state.zero
    model.train()
    meter = Throughput(
        every=output.throughput_log_steps, device_type=fabric.device.type, write=log.line
    )
    if plan.world_size > 1:
        meter.sum_with(lambda counts: _sums_over_ranks(fabric, counts))
    with StopRequest() as stop, state.writer:
        if progress.step == 0:
            # Here the state comes first: a run killed between the two would else go on from initial
            # weights that --save_dtype has rounded.
            _save(fabric, state, folder, output, ["init"], state_first=True)
        batches = recipe.batches(progress)
        waited = trained_for = 0.0
        while progress.step < plan.total_steps:
            begin = time.perf_counter()
            micro_batches = next(batches)
            waited += time.perf_counter() - begin
            lr = schedule.lr_at(progress.step)
            weight_decay = schedule.weight_decay_at(progress.step)
            set_hyperparameters(optimizer, lr=lr, weight_decay=weight_decay)

            targets = _sum_over_ranks(fabric, sum(b.target_tokens for b in micro_batches))
            loss_here = torch.zeros((), device=fabric.device)
            carry = None
            for i, batch in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                with fabric.no_backward_sync(model, enabled=not is_last), split_over(group):
                    loss_sum, _, carry, _ = recipe.loss(model, batch.to(fabric.device), carry)
                    if in_backward:
                        _check_finite(progress.step + 1, float(loss_sum), 0.0, folder)
                    # DDP and FSDP average gradients over ranks; targets already counts all of them.
                    fabric.backward(loss_sum * (fabric.world_size / max(targets, 1)))
                loss_here += loss_sum.detach()
                if output.throughput_log_steps:
                    rows, tokens, visual = batch.counts
                    meter.add(samples=rows, tokens=tokens, visual_tokens=visual)
            if _scales_its_loss(fabric):
                fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
            layers = []
            has_gradients = not in_backward and zero is None
            if output.log_layers and has_gradients and log.is_on_cadence(progress.step + 1):
                layers = layer_statistics(fabric, model)  # before clipping changes the gradients
            if in_backward:
                norm = optimizer.gradient_norm()
            elif zero is not None:
                norm = 0.0  # known after the step, which clips
            else:
                norm = clip_gradients(trained, optimizer_options.grad_clip)
            loss, stop_votes = _over_ranks(fabric, loss_here, stop.requested is not None)
            loss /= max(targets, 1)
            _check_finite(
                progress.step + 1, loss, 0.0 if _scales_its_loss(fabric) else norm, folder
            )
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if zero is not None:  # which leaves the weights alone where the norm is not finite
                norm = zero.gradient_norm()
                _check_finite(progress.step + 1, loss, norm, folder)
            write_copies(trained)

            took = time.perf_counter() - begin
            progress.step += 1
            progress.tokens += plan.tokens_per_step
            progress.seconds += took
            trained_for += took
            progress.epoch_loss += loss
            progress.epoch_loss_steps += 1
            is_over = progress.step == plan.total_steps
            ends_epoch = progress.step % plan.epoch_steps == 0
            if _is_due(progress.step, output.val_every) or (
                is_over or (ends_epoch and not output.val_every)
            ):
                measured = recipe.validate(model)
                if measured:
                    log.validation({"step": progress.step, **measured})
            log.layers(progress.step, layers)
            log.step(
                {
                    "step": progress.step,
                    "epoch": (progress.step - 1) // plan.epoch_steps,
                    "tokens": progress.tokens,
                    "loss": loss,
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "grad_norm": norm,
                    "tokens_per_s": plan.tokens_per_step / took,
                    "seconds": progress.seconds,
                }
            )
            meter.step(took)
            if _is_due(progress.step, output.sample_every):
                text = recipe.sample(model, progress.step)
                if text is not None:
                    log.sample(text, progress.step)
            label = None
            if ends_epoch:
                epoch = progress.epoch
                mean_loss = progress.epoch_loss / progress.epoch_loss_steps
                log.epoch(epoch, mean_loss, lr, epoch - first_epoch)
                progress.epoch += 1
                progress.epoch_loss, progress.epoch_loss_steps = 0.0, 0
                # As upstream: every so many epochs from the first on, and the last one always.
                if is_over or _is_due(epoch - first_epoch, output.epoch_save):
                    label = str(epoch)
            labels = [] if label is None else [label]
            labels += ["final"] if is_over else []
            must_stop = stop_votes and not is_over
            if labels or must_stop or _is_due(progress.step, output.save_every):
                _save(fabric, state, folder, output, labels)
            if must_stop:
                state.writer.finish()
                log.line(f"stopped after step {progress.step}; the same command goes on from there")
                return stop.answer()
        state.writer.timed(state.writer.finish)
        log.line(f"waited for data during {waited / trained_for:.2%} of the training time")
        log.line(state.writer.in_words())
    return None


def _check_finite(step: int, loss: float, norm: float, folder: Path) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient norm {norm}, so the optimizer was "
            "not moved and nothing was saved; the newest good state is in "
            f"{folder / 'resume'}. A lower lr_init or a longer warmup, in another proj_dir, may "
            "help"
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(
    fabric: Any,
    state: RunState,
    folder: Path,
    output: OutputOptions,
    labels: Sequence[str],
    *,
    state_first: bool = False,
) -> None:
    """Write weights of these labels, and then a resume state: a kill in between costs the steps
    since the state before, which then write the same weights again."""

    def weights() -> None:
        for label in labels:
            state.write_weights(folder, label, dtype=output.save_dtype, write=fabric.is_global_zero)

    def resume_state() -> None:
        saved = state.save(folder, write=fabric.is_global_zero)
        if fabric.is_global_zero:
            keep = output.keep_last
            state.writer.run(lambda: prune_resume_states(folder, keep, just_written=saved))

    parts = (resume_state, weights) if state_first else (weights, resume_state)
    state.writer.timed(lambda: [part() for part in parts])


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> float:
    """The global gradient norm before clipping; scales the gradients down to `limit` where it is
    larger.

    limit: 0 = never.  Source: RWKV-LM and torch use the coefficient min(1, limit / (norm + 1e-6)).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
    value = float(norm)
    if limit and value + 1e-6 > limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return value


def _scales_its_loss(fabric: Any) -> bool:
    """fp16 on a GPU: the scaler itself skips steps whose gradients overflow."""
    return getattr(fabric.strategy.precision, "scaler", None) is not None


def _sum_over_ranks(fabric: Any, count: int) -> int:
    if fabric.world_size == 1:
        return count
    return int(fabric.all_reduce(torch.tensor(count, device=fabric.device), reduce_op="sum"))


def _sums_over_ranks(fabric: Any, counts: list[float]) -> list[float]:
    values = torch.tensor(counts, device=fabric.device)
    total: list[float] = fabric.all_reduce(values, reduce_op="sum").tolist()
    return total


def _over_ranks(fabric: Any, loss: Tensor, wants_to_stop: bool) -> tuple[float, bool]:
    """(sum of the ranks' losses, whether any rank was asked to stop); one message for both."""
    if fabric.world_size == 1:
        return float(loss), wants_to_stop
    both = torch.stack([loss.double(), loss.new_tensor(float(wants_to_stop)).double()])
    total, votes = fabric.all_reduce(both, reduce_op="sum").tolist()
    return total, votes > 0


class StopRequest:
    """SIGTERM and Ctrl-C ask the loop to save and stop after the present step; a second one stops
    at once, as it does outside of the loop."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            self.__exit__()
            signal.raise_signal(number)
        self.requested = signal.Signals(number)

    def answer(self) -> Stopped:
        """Exit codes as a shell gives them: 143 for SIGTERM, 130 for Ctrl-C."""
        which = self.requested or signal.SIGTERM  # another rank was asked
        return Stopped(which.name, 128 + which.value)

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
