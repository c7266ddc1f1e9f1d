"""Supervised fine-tuning on conversations: its recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rwkvtune.data.batch import Batch
from rwkvtune.data.chat import encoded
from rwkvtune.data.chat_batches import ChatBatches, validation_batches
from rwkvtune.data.prefetch import prefetched
from rwkvtune.evaluation.perplexity import evaluate_batches
from rwkvtune.files import atomic_write
from rwkvtune.inference.chat import ChatSettings, answer
from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy
from rwkvtune.models.layers import State
from rwkvtune.training.lm import next_token_loss, validation_row
from rwkvtune.training.log import RunLog, without_controls
from rwkvtune.training.plan import Plan
from rwkvtune.training.run import RunResult, train
from rwkvtune.training.run_state import Progress
from rwkvtune.training.sft_config import SFTConfig
from rwkvtune.training.sft_data import ChatData, open_data

MEASURES = {
    "val_loss": "nats per token",
    "val_bits_per_byte": "bits per byte",
    "val_perplexity": "perplexity",
}
EVALUATION = "evaluation.json"


class ChatRecipe:
    """Next-token prediction of what the assistant says."""

    def __init__(self, config: SFTConfig, plan: Plan, data: ChatData, fabric: Any) -> None:
        self.config, self.plan, self.data, self.fabric = config, plan, data, fabric
        self._batches = ChatBatches(
            data.training,
            data.rows,
            batching=data.batching,
            global_bsz=plan.global_bsz,
            seed=config.output.random_seed,
        )
        self.measured: dict[str, float] = {}
        self.base: dict[str, Any] = {}
        """What the model was before the first step: the columns of a validation, and `sample`."""

    def batches(self, progress: Progress) -> Iterator[list[Batch]]:
        return prefetched(map(self._batches_of, count(progress.step)))

    def _batches_of(self, step: int) -> list[Batch]:
        plan = self.plan
        replica, stretch = divmod(self.fabric.global_rank, plan.context_parallel)
        batches: Iterable[Batch] = self._batches.batches(
            step,
            micro_bsz=plan.micro_bsz,
            accumulate=plan.accumulate,
            rank=replica,
            world_size=plan.world_size,
        )
        batches = (batch.stretch(stretch, plan.context_parallel) for batch in batches)
        if self.fabric.device.type == "cuda":
            batches = map(Batch.pinned, batches)
        return [part for batch in batches for part in batch.chunks(self.config.schedule.chunk_len)]

    def loss(
        self, model: nn.Module, batch: Batch, carry: State | None
    ) -> tuple[Tensor, int, State, dict[str, float]]:
        return next_token_loss(model, batch, carry, self.config.optimizer)

    def validate(self, model: nn.Module) -> dict[str, float]:
        if self.data.validation is None:
            return {}
        ranks = self.fabric.world_size
        found = evaluate_batches(
            model,
            validation_batches(
                self.data.validation,
                batch_size=self.plan.micro_bsz,
                rank=self.fabric.global_rank,
                world_size=ranks,
                max_rows=self.config.output.val_windows,
            ),
            device=self.fabric.device,
            loss_head=partial(head_cross_entropy, l2wrap=0.0),
            chunk_len=self.config.schedule.chunk_len,
            byte_lengths=self.data.tokenizer.token_byte_lengths(),
            sum_over_ranks=None if ranks == 1 else partial(self.fabric.all_reduce, reduce_op="sum"),
        )
        self.measured = validation_row(found)
        return self.measured

    def sample(self, model: nn.Module, step: int) -> str | None:
        question = self._question()
        return None if question is None else self._answer(model, question)

    def begins(self, model: nn.Module, progress: Progress, log: RunLog) -> None:
        """Measure the base model, once in a run."""
        if progress.step or self.base or self.data.validation is None:
            return
        measured = self.validate(model)
        self.base = {**measured, "sample": self.sample(model, 0)}
        log.validation({"step": 0, **measured})

    def ends(self, model: nn.Module, log: RunLog) -> None:
        """Say what training has brought: the base model beside the tuned one."""
        if not self.base or not self.measured:
            return
        tuned = {**self.measured, "sample": self.sample(model, self.plan.total_steps)}
        log.line("held-out part of the data, before -> after:")
        log.table(
            (words, f"{self.base[name]:.4f} -> {tuned[name]:.4f}")
            for name, words in MEASURES.items()
            if name in tuned and name in self.base
        )
        question = self._question()
        if question is not None:
            log.line(_told("asked", self.data.tokenizer.decode(question)))
            log.line(_told("before", str(self.base["sample"]) or "(an empty answer)"))
            log.line(_told("after", str(tuned["sample"]) or "(an empty answer)"))
        if self.fabric.is_global_zero:
            content = json.dumps({"base": self.base, "tuned": tuned}, ensure_ascii=False, indent=1)
            path = Path(self.config.output.proj_dir) / EVALUATION
            atomic_write(path, lambda file: file.write(content.encode() + b"\n"))

    def _question(self) -> list[int] | None:
        """What samples answer: the given prompt, else the first held-out conversation up to its
        first answer."""
        prompt, data = self.config.output.sample_prompt, self.data
        if prompt:
            pieces = data.template.prompt([{"role": "user", "content": prompt}])
            return encoded(pieces, data.tokenizer.encode)[0]
        return (data.validation or data.training).first_question()

    def _answer(self, model: nn.Module, question: list[int]) -> str:
        settings = ChatSettings(max_tokens=self.config.output.sample_tokens, temperature=0.0)
        data = self.data
        return "".join(answer(model, data.tokenizer, data.template, question, settings)).strip()

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base}  # batches are a pure function of the step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base = state["base"]


def fine_tune(
    config: SFTConfig, *, notes: Sequence[str] = (), rows: Sequence[tuple[str, str]] = ()
) -> RunResult:
    """Fine-tune, or go on fine-tuning, as `config` says; see `train`."""
    return train(config, open_data, ChatRecipe, notes=notes, rows=rows)


def _told(name: str, text: str) -> str:
    indented = ("\n" + " " * 10).join(without_controls(text).split("\n"))
    return f"  {name:<8}{indented}"
