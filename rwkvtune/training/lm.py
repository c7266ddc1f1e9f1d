"""Pretraining of a language model: its recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from rwkvtune.data.batch import Batch
from rwkvtune.data.prefetch import prefetched
from rwkvtune.evaluation.perplexity import Evaluation, evaluate, together
from rwkvtune.inference.generate import generate
from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy
from rwkvtune.models.layers import State, detached
from rwkvtune.training.config import OptimizerOptions, TrainConfig
from rwkvtune.training.fabric import unwrapped
from rwkvtune.training.lm_data import LMData, open_data
from rwkvtune.training.log import RunLog
from rwkvtune.training.plan import Plan
from rwkvtune.training.run import RunResult, train
from rwkvtune.training.run_state import Progress

SAMPLE_TEMPERATURE = 0.8


class LanguageModelRecipe:
    """Next-token prediction on windows of one token stream."""

    def __init__(self, config: TrainConfig, plan: Plan, data: LMData, fabric: Any) -> None:
        self.config, self.plan, self.data, self.fabric = config, plan, data, fabric
        self.measured: dict[str, float] = {}
        """The latest validation."""

    def batches(self, progress: Progress) -> Iterator[list[Batch]]:
        return prefetched(map(self._batches_of, count(progress.step)))

    def _batches_of(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one step."""
        plan = self.plan
        first = step * plan.global_bsz
        replica, stretch = divmod(self.fabric.global_rank, plan.context_parallel)
        batches: Iterable[Batch] = (
            self.data.dataset.batch(
                first + i * plan.micro_bsz * plan.world_size,
                plan.micro_bsz,
                rank=replica,
                world_size=plan.world_size,
            ).stretch(stretch, plan.context_parallel)
            for i in range(plan.accumulate)
        )
        if self.fabric.device.type == "cuda":
            batches = map(Batch.pinned, batches)
        return [part for batch in batches for part in batch.chunks(self.config.schedule.chunk_len)]

    def loss(
        self, model: nn.Module, batch: Batch, carry: State | None
    ) -> tuple[Tensor, int, State, dict[str, float]]:
        return next_token_loss(model, batch, carry, self.config.optimizer)

    def validate(self, model: nn.Module) -> dict[str, float]:
        sources = self.data.validation
        if not sources:
            return {}
        tokenizer, ranks = self.data.tokenizer, self.fabric.world_size
        found = [
            evaluate(
                model,
                source.tokens,
                ctx_len=self.plan.ctx_len,
                batch_size=self.plan.micro_bsz,
                device=self.fabric.device,
                loss_head=partial(head_cross_entropy, l2wrap=0.0),
                max_windows=self.config.output.val_windows,
                byte_lengths=None if tokenizer is None else tokenizer.token_byte_lengths(),
                reset_at_documents=self.config.data.reset_at_documents,
                chunk_len=self.config.schedule.chunk_len,
                rank=self.fabric.global_rank,
                world_size=ranks,
                sum_over_ranks=(
                    None if ranks == 1 else partial(self.fabric.all_reduce, reduce_op="sum")
                ),
            )
            for source in sources
        ]
        whole = together(found, self.data.validation_weights)
        self.measured = validation_row(whole)
        losses = [part.loss for part in found]
        self.measured |= dict(zip(self.data.validation_columns, losses, strict=False))
        return self.measured

    def sample(self, model: nn.Module, step: int) -> str | None:
        tokenizer, output = self.data.tokenizer, self.config.output
        if tokenizer is None:
            return None
        ids = generate(
            model,
            tokenizer.encode(output.sample_prompt),
            max_tokens=output.sample_tokens,
            temperature=SAMPLE_TEMPERATURE,
            seed=output.random_seed + step,
        )
        # A vocabulary may be padded beyond the tokenizer: such ids stand for no text.
        known = [id for id in ids if id < tokenizer.vocab_size]
        return output.sample_prompt + tokenizer.decode(known)

    def begins(self, model: nn.Module, progress: Progress, log: RunLog) -> None: ...

    def ends(self, model: nn.Module, log: RunLog) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}  # batches are a pure function of the step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, f"a language model's recipe has no state of its own, found {list(state)}"


def next_token_loss(
    model: nn.Module, batch: Batch, carry: State | None, options: OptimizerOptions
) -> tuple[Tensor, int, State, dict[str, float]]:
    """What `Recipe.loss` gives, for a language model: gradients end where the batch begins."""
    head = partial(
        head_cross_entropy,
        targets=batch.targets,
        l2wrap=options.l2wrap,
        chunk_rows=options.head_chunk,
        backend=str(unwrapped(model).backend),
    )
    state = carry if batch.continues else None
    loss_sum, last = model(batch.input_ids, state, reset=batch.reset, head=head)
    return loss_sum, batch.target_tokens, detached(last), {}


def validation_row(found: Evaluation) -> dict[str, float]:
    """The columns val_* of the log."""
    row = {"val_loss": found.loss, "val_perplexity": found.perplexity}
    if found.bits_per_byte is not None:
        row["val_bits_per_byte"] = found.bits_per_byte
    return row


def train_language_model(
    config: TrainConfig, *, notes: Sequence[str] = (), rows: Sequence[tuple[str, str]] = ()
) -> RunResult:
    """Pretrain, or go on pretraining, as `config` says; see `train`."""
    return train(config, open_data, LanguageModelRecipe, notes=notes, rows=rows)
