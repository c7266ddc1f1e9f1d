"""Loss, perplexity and bits per byte of a model on a stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rwkvtune.data.batch import IGNORED_TARGET, Batch
from rwkvtune.data.lm_dataset import validation_windows
from rwkvtune.errors import UserError
from rwkvtune.inference.generate import evaluating


class LossHead(Protocol):
    def __call__(self, hidden: Tensor, weight: Tensor, /, targets: Tensor) -> Tensor:
        """The sum of the losses, nats, a scalar; targets of -100 count for nothing.

        hidden: [B, T, C].  weight: of the head, [V, C].  targets: int64 [B, T].
        """


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    loss: float
    """Nats per target token."""
    tokens: int
    """Target tokens, all ranks together."""
    num_bytes: int
    """That the targets stand for; 0 if not known."""

    @property
    def bits_per_byte(self) -> float | None:
        """All the loss, in bits, over the bytes; None if not known."""
        if not self.num_bytes:
            return None
        return self.loss * self.tokens / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where a float ends."""
        return math.exp(self.loss) if self.loss < 700 else self.loss * math.inf


def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    ctx_len: int,
    batch_size: int,
    device: torch.device | str,
    loss_head: LossHead,
    max_windows: int = 0,
    byte_lengths: np.ndarray | None = None,
    reset_at_documents: bool = False,
    chunk_len: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Measure a model on tokens [N], in windows that together have each of tokens[1:] as a target.

    Every window starts from a zero state, so its first targets are predicted from little context: a
    longer ctx_len gives a lower loss.
    loss_head: such as rwkvtune.kernels.fused.cross_entropy.head_cross_entropy.
    chunk_len: run a window in pieces of so many tokens, which pass their state on; 0 = at once.
    max_windows: use only the first so many windows; 0 = all.  byte_lengths: [V], bytes per token.
    rank, world_size, sum_over_ranks: each rank takes its share of the windows; sum_over_ranks, such
    as a Fabric's all_reduce, adds up a float64 vector, so that all ranks return the same.
    Runs in the caller's autocast, if any; the model's train mode is as before afterwards. UserError
    when there is nothing to predict.
    """
    if max_windows:
        tokens = tokens[: max_windows * ctx_len + 1]
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} tokens are too few to evaluate on: 2 or more are needed")
    batches = validation_windows(
        tokens,
        ctx_len,
        batch_size=batch_size,
        reset_at_documents=reset_at_documents,
        rank=rank,
        world_size=world_size,
    )
    return evaluate_batches(
        model,
        batches,
        device=device,
        loss_head=loss_head,
        chunk_len=chunk_len,
        byte_lengths=byte_lengths,
        sum_over_ranks=sum_over_ranks,
    )


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    loss_head: LossHead,
    chunk_len: int = 0,
    byte_lengths: np.ndarray | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Measure a model on all targets of the batches, of which each rank has as many; see
    `evaluate`."""
    sums = np.zeros(3)  # nats, target tokens, bytes
    with evaluating(model):
        state = None
        for batch in (part for whole in batches for part in whole.chunks(chunk_len)):
            on_device = batch.to(device)
            head = partial(loss_head, targets=on_device.targets)
            before = state if batch.continues else None
            nats, state = model(on_device.input_ids, before, reset=on_device.reset, head=head)
            sums += (float(nats), batch.target_tokens, _num_bytes(batch.targets, byte_lengths))
    if sum_over_ranks is not None:
        sums = sum_over_ranks(torch.from_numpy(sums)).cpu().numpy()
    nats_sum, num_targets, num_bytes = (float(value) for value in sums)
    return Evaluation(nats_sum / num_targets, int(num_targets), int(num_bytes))


def together(parts: Sequence[Evaluation], weights: Sequence[float] | None = None) -> Evaluation:
    """Several evaluations as one: of all their tokens, or with a share of the tokens for each.

    weights: such as a mixture's shares; what counts then is the loss of a stream that holds the
    parts in these proportions of tokens.
    """
    shares = weights or [part.tokens for part in parts]
    total = sum(shares)
    tokens = sum(part.tokens for part in parts)
    loss = sum(part.loss * share for part, share in zip(parts, shares, strict=True)) / total
    bytes_per_token = (
        sum(part.num_bytes / part.tokens * share for part, share in zip(parts, shares, strict=True))
        / total
    )
    all_known = all(part.num_bytes for part in parts)
    return Evaluation(loss, tokens, round(bytes_per_token * tokens) if all_known else 0)


def _num_bytes(targets: Tensor, byte_lengths: np.ndarray | None) -> int:
    """Bytes that targets [B, T] stand for; 0 without byte_lengths."""
    if byte_lengths is None:
        return 0
    ids = targets[targets != IGNORED_TARGET].numpy()
    if ids.size and ids.max() >= len(byte_lengths):
        raise UserError(
            f"the tokens hold the id {ids.max()}, the tokenizer has 0 to {len(byte_lengths) - 1}: "
            "give the tokenizer that these tokens were made with"
        )
    return int(byte_lengths[ids].sum())
