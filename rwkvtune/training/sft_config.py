"""The typed description of a fine-tuning run: what differs from pretraining's. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rwkvtune.training.config import ScheduleOptions, TrainConfig


@dataclass(frozen=True)
class ChatDataOptions:
    """Conversations."""

    data_file: str = ""
    """JSONL, one conversation a line (also .gz, .zst, a folder of such files, or a glob)."""
    val_data_file: str = ""
    """Conversations for validation; empty = val_share of data_file."""
    val_share: float = 0.05
    """Share of data_file that is held out for validation, 0 .. 1; 0 = none. Without effect when
    val_data_file is given."""
    ctx_len: int = 1024
    """Most tokens of a conversation, and tokens of a packed row."""
    template: str = ""
    """g1, world, a Jinja file, or a run's template.json; empty = the one kept with the weights,
    else g1."""
    batching: Literal["packed", "bucketed"] = "packed"
    """packed = several conversations in a row, the state set to zero between them; bucketed = one a
    row, those of a step of about one length."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A line that cannot be used, or is longer than ctx_len: stop and name it, or leave it out and
    count."""
    tokenizer: str = ""
    """bytes, world, a tokenizer.json or a vocabulary file; empty = the one beside the weights, else
    world for weights of its size."""


@dataclass(frozen=True)
class TuningScheduleOptions(ScheduleOptions):
    """Length and learning rate. Steps are optimizer steps; tokens are those of all ranks."""

    micro_bsz: int = 4
    """Rows per device and micro-batch."""
    lr_init: float = 2e-5
    """Highest learning rate."""
    lr_final: float = 2e-6
    """Learning rate at the end."""


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Everything that `rwkvtune sft` can be told."""

    # Other names for the same places: what puts a run together reads only ctx_len of them.
    data: ChatDataOptions = field(default_factory=ChatDataOptions)  # type: ignore[assignment]
    schedule: TuningScheduleOptions = field(default_factory=TuningScheduleOptions)

    data_file_is: ClassVar[str] = "a .jsonl file of conversations"

    @property
    def has_validation(self) -> bool:
        return bool(self.data.val_data_file or self.data.val_share)

    @property
    def has_samples(self) -> bool:
        return self.has_validation or super().has_samples  # before and after training

    @property
    def joins_documents(self) -> str:
        if self.data.batching != "packed":
            return ""
        return (
            "batching=packed: a conversation that starts inside a row would begin from zero, not "
            "from the trained state; give --batching bucketed"
        )

    def problems(self) -> list[str]:
        found = super().problems()
        share = self.data.val_share
        if isinstance(share, int | float) and not 0 <= share < 1:
            found.append(f"val_share={share} must be in [0, 1)")
        return found
