"""Learning rate and weight decay as pure functions of the optimizer step.

A resumed run therefore continues with the very numbers of a run that was never stopped. The
published curves are those of RWKV-LM's training callbacks, checked against numbers they gave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rwkvtune.errors import UserError

Kind = Literal[
    "cosine", "linear", "exponential", "constant", "wsd", "wsd_cosine", "cos",
    "cosine_exponential_mean",
]  # fmt: skip

WARMUP_FLOOR = 0.01
"""Share of the learning rate that the first warmup step gets (RWKV-LM)."""

WORLD_TRAIN_RISE = 100
"""Steps of the rise from 0 inside wsd_cosine, whatever warmup_steps says (world_train.py)."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of one run; step 0 is its first optimizer step.

    With q the progress from the end of the warmup (0) to the end of the run (1):

        cosine        a half cosine wave from lr_init to lr_final; RWKV-LM's default
        linear        a straight line from lr_init to lr_final
        exponential   lr_init * (lr_final / lr_init)^q; the straight line where one of them is 0
        constant      lr_init
        wsd           lr_init, then over the last decay_share of the run down to lr_final as
                      1 - sqrt(share of the decay done): warmup-stable-decay, arXiv:2405.18392
        wsd_cosine    what world_train.py calls wsd: 100 steps up from 0, then a half cosine wave to
                      0; it has no plateau and takes no notice of lr_final
        cos           world_train.py's: half a cosine wave from step 0, under the warmup too
        cosine_exponential_mean   the mean of both, for RWKV-LM's negative exit tokens

    linear and exponential count q by steps and reach lr_final at the last step; the others count by
    tokens and would reach it at the step after the last. The warmup multiplies the first
    warmup_steps by a line from 1 % to 100 %.
    """

    kind: Kind
    lr_init: float
    """Highest learning rate."""
    lr_final: float
    """Learning rate at the end."""
    warmup_steps: int
    """Optimizer steps; 0 or less = no warmup."""
    total_tokens: int
    """Length of the run, all ranks together: no step begins at or past this many tokens."""
    tokens_per_step: int
    """ctx_len x windows per optimizer step, over all ranks and accumulated micro-batches."""
    decay_share: float = 0.2
    """wsd: the last share of the run, (0, 1], in which the learning rate falls."""
    weight_decay: float = 0.0
    """Decoupled, per step, times the learning rate."""
    weight_decay_final: float = -1.0
    """Weight decay at q = 1, exponentially approached; 0 or less = constant."""
    hold_steps: int = 0
    """linear, exponential: steps at lr_init before the fall begins."""
    epoch_schedule_steps: int = 0
    """cosine_exponential_mean: steps after which the exponential half ends."""
    restart_step: int = 0
    """First step since bare weights were loaded: the warmup runs from here, all else from 0."""

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in get_args(Kind):
            problems.append(f"schedule {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if self.total_tokens < 1 or self.tokens_per_step < 1:
            problems.append(
                f"total_tokens={self.total_tokens} and tokens_per_step={self.tokens_per_step} "
                "must be at least 1"
            )
        if not 0 < self.decay_share <= 1:
            problems.append(f"decay_share={self.decay_share} must be above 0 and at most 1")
        if self.weight_decay_final > 0 and self.weight_decay <= 0:
            problems.append(
                f"weight_decay_final={self.weight_decay_final} needs a weight_decay above 0 "
                f"to start from, got {self.weight_decay}"
            )
        if self.kind == "cosine_exponential_mean" and self.epoch_schedule_steps < 1:
            problems.append("cosine_exponential_mean needs epoch_schedule_steps of at least 1")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run; the last one may reach past total_tokens."""
        return -(-self.total_tokens // self.tokens_per_step)

    def is_finished(self, step: int) -> bool:
        """Whether the run ends before `step`; RWKV-LM saves rwkv-final.pth and leaves here."""
        return step >= self.total_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, before the scale of a parameter group."""
        return self._curve(step) * self._warmup(step)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of optimizer step `step`, for the parameter group that decays."""
        if self.weight_decay_final <= 0:
            return self.weight_decay
        ratio = self.weight_decay_final / self.weight_decay
        if self.kind in ("linear", "exponential"):
            q = self._step_progress(step, self.total_steps)
        else:
            q = self._token_progress(step)
        return self.weight_decay * math.pow(ratio, q)

    def _curve(self, step: int) -> float:
        """Learning rate without the warmup."""
        match self.kind:
            case "cosine":
                return self._cosine(self._token_progress(step))
            case "linear":
                return self._line(self._step_progress(step, self.total_steps))
            case "exponential":
                return self._exponential(self._step_progress(step, self.total_steps))
            case "constant":
                return self.lr_init
            case "wsd":
                decayed = self._token_share(step, self.total_tokens * (1 - self.decay_share))
                return self.lr_final + (self.lr_init - self.lr_final) * (1 - math.sqrt(decayed))
            case "wsd_cosine":
                if step < WORLD_TRAIN_RISE:
                    return self.lr_init * step / WORLD_TRAIN_RISE
                q = self._token_share(step, WORLD_TRAIN_RISE * self.tokens_per_step)
                return self.lr_init * 0.5 * (1 + math.cos(math.pi * q))
            case "cos":
                return self._cosine(self._token_share(step, 0))
            case "cosine_exponential_mean":
                q = self._step_progress(step, self.epoch_schedule_steps)
                return (self._exponential(q) + self._cosine(self._token_progress(step))) / 2

    def _warmup(self, step: int) -> float:
        """Factor of the learning rate, from WARMUP_FLOOR up to 1."""
        since_restart = step - self.restart_step
        if since_restart >= self.warmup_steps:
            return 1.0
        return WARMUP_FLOOR + (1 - WARMUP_FLOOR) * since_restart / self.warmup_steps

    def _token_progress(self, step: int) -> float:
        """q by tokens. As upstream, warmup_steps = -1 is a warmup that ended before step 0."""
        return self._token_share(step, self.warmup_steps * self.tokens_per_step)

    def _token_share(self, step: int, start: float) -> float:
        """How much of the way from token `start` to the end of the run lies behind, 0 to 1."""
        return _share(step * self.tokens_per_step, start, self.total_tokens)

    def _step_progress(self, step: int, end: int) -> float:
        """q by steps, one step ahead of the count, as upstream's exponential schedule has it."""
        return _share(step + 1, self.hold_steps + self.warmup_steps, end)

    def _cosine(self, q: float) -> float:
        # RWKV-LM writes this as lr_init times a factor, which divides by lr_init.
        middle = 0.5 * (self.lr_init + self.lr_final)
        return middle + 0.5 * (self.lr_init - self.lr_final) * math.cos(math.pi * q)

    def _line(self, q: float) -> float:
        return self.lr_init + (self.lr_final - self.lr_init) * q

    def _exponential(self, q: float) -> float:
        if self.lr_init == 0 or self.lr_final == 0:
            return self._line(q)
        return self.lr_init * math.pow(self.lr_final / self.lr_init, q)


def _share(position: float, start: float, end: float) -> float:
    """How far `position` has come from `start` to `end`, 0 to 1, also where end <= start."""
    if position <= start:
        return 0.0
    if position >= end:
        return 1.0
    return (position - start) / (end - start)
