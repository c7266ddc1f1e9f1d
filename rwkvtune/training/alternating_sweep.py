"""Variants and schedules trained on the same data with the same budget, and compared.

Every cell starts from the same weights, sees the same samples in the same order, and is asked the
same questions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkvtune.errors import UserError
from rwkvtune.evaluation.alternating import (
    Accuracy,
    Answered,
    Prompts,
    Question,
    accuracy_of,
    answer,
    paired_difference,
    write_answers,
)
from rwkvtune.files import atomic_write
from rwkvtune.inference.alternating import Checkpoint, load
from rwkvtune.models.alternating.masks import DEFAULT_SCHEDULE
from rwkvtune.models.alternating.tokenizer import load_tokenizer
from rwkvtune.models.alternating.variants import Variant
from rwkvtune.training.alternating import (
    changes,
    checked_samples,
    data_module,
    processor_of,
    train,
)
from rwkvtune.training.alternating_config import AlternatingSettings

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Cell:
    variant: Variant
    schedule: str

    @property
    def name(self) -> str:
        plain = self.schedule.replace(":", "").replace(",", "-")
        return self.variant if self.variant == "base" else f"{self.variant}-{plain}"


@dataclass(frozen=True)
class CellResult:
    cell: Cell
    answers: list[Answered]
    loss: float
    steps: int
    seconds: float
    samples_per_s: float

    @property
    def accuracy(self) -> Accuracy:
        return accuracy_of(self.answers)


def cells_of(variants: Sequence[str], schedules: Sequence[str]) -> list[Cell]:
    """Every variant with every schedule; base, which has no special layers, once."""
    found: list[Cell] = []
    for variant in variants:
        if variant not in ("base", "alternating", "alternating_cross"):
            raise UserError(
                f"there is no variant {variant!r}: choose base, alternating, alternating_cross"
            )
        for schedule in ["none"] if variant == "base" else schedules or [DEFAULT_SCHEDULE]:
            found.append(Cell(variant, schedule))  # type: ignore[arg-type]
    return found


def run_cell(
    cell: Cell,
    settings: AlternatingSettings,
    questions: Sequence[Question],
    folder: Path,
    *,
    say: Callable[[str], None],
) -> CellResult | int:
    """Train a cell into `folder`, or go on there, and ask it; a cell that is done is only read.

    An exit code where the training was stopped.
    """
    result_path = folder / RESULT_FILE
    if result_path.exists():
        return _read(cell, settings, questions, result_path)
    source = Checkpoint.open(settings.model.model_name_or_path)
    masks: dict[str, Any] = {} if cell.variant == "base" else {"mask_schedule": cell.schedule}
    masks |= {k: v for k, v in settings.mask_settings.items() if k != "mask_schedule"}
    model, _ = load(source, variant=cell.variant, llava=settings.llava, **masks)
    tokenizer = load_tokenizer(source.folder)
    here = replace(settings, trainer=replace(settings.trainer, output_dir=str(folder)))
    module = data_module(model, checked_samples(tokenizer, here))
    began = time.perf_counter()
    outcome = train(
        model,
        tokenizer,
        module,
        here,
        naming=source.naming,
        tokenizer_from=source.folder,
        say=say,
    )
    if outcome.stopped:
        return outcome.stopped.exit_code
    seconds = time.perf_counter() - began
    prompts = Prompts(tokenizer, processor_of(model.config), settings.data.version)
    answers = list(answer(model, prompts, questions))
    write_answers(folder / "answers.jsonl", answers)
    batch = here.trainer.per_device_train_batch_size * here.trainer.gradient_accumulation_steps
    result = CellResult(
        cell,
        answers,
        outcome.loss,
        outcome.steps,
        seconds,
        samples_per_s=outcome.steps * batch / max(seconds, 1e-9),
    )
    _write(result, settings, result_path)
    return result


def _budget(settings: AlternatingSettings) -> dict[str, Any]:
    """What a cell's result depends on."""
    steps = {n: getattr(settings.trainer, n) for n in ("num_train_epochs", "max_steps")}
    return settings.fixed_in_a_run | steps


def _write(result: CellResult, settings: AlternatingSettings, path: Path) -> None:
    values: dict[str, Any] = {
        "variant": result.cell.variant,
        "schedule": result.cell.schedule,
        "accuracy": result.accuracy.value,
        "interval": result.accuracy.interval,
        "loss": result.loss,
        "steps": result.steps,
        "seconds": result.seconds,
        "samples_per_s": result.samples_per_s,
        "settings": _budget(settings),
        "answers": [[a.question.id, *a.log_likelihoods] for a in result.answers],
    }
    text = json.dumps(values, indent=1).encode()
    atomic_write(path, lambda file: file.write(text))


def _read(
    cell: Cell, settings: AlternatingSettings, questions: Sequence[Question], path: Path
) -> CellResult:
    values = json.loads(path.read_text(encoding="utf-8"))
    if changed := changes(values.get("settings", {}), _budget(settings)):
        raise UserError(
            f"{path} is the result of other settings: {'; '.join(changed)}. Choose another --output"
        )
    rows = values["answers"]
    if [row[0] for row in rows] != [q.id for q in questions]:
        raise UserError(f"{path} answers other questions: choose another --output")
    answers = [Answered(q, tuple(row[1:])) for q, row in zip(questions, rows, strict=True)]
    return CellResult(
        cell,
        answers,
        values["loss"],
        values["steps"],
        values["seconds"],
        values["samples_per_s"],
    )


def table(results: Sequence[CellResult]) -> str:
    """Accuracies with 95 % intervals, the difference to base on the same questions, loss and
    speed."""
    base = next((r for r in results if r.cell.variant == "base"), None)
    header = ("variant", "schedule", "accuracy (95 %)", "minus base", "loss", "steps", "samples/s")
    rows = [header]
    for r in results:
        difference = ""
        if base is not None and r is not base:
            mean, low, high = paired_difference(r.answers, base.answers)
            difference = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        rows.append(
            (
                r.cell.variant,
                r.cell.schedule,
                str(r.accuracy),
                difference,
                f"{r.loss:.4f}",
                str(r.steps),
                f"{r.samples_per_s:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
