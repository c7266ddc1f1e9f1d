"""All that must survive the end of a process, saved and restored as one object."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkvtune.adapters.adapter import Adapter
from rwkvtune.adapters.base import Base
from rwkvtune.checkpoint import (
    load_resume_state,
    resume_folder,
    save_resume_state,
    save_weights,
)
from rwkvtune.training.fabric import unwrapped
from rwkvtune.training.optim import load_optimizer_state, optimizer_state_to_tensors
from rwkvtune.training.saving import Writer
from rwkvtune.training.zero import ZeroEngine


@dataclass
class Progress:
    """How far a run is. Learning rate and batches are pure functions of this."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Mini-epochs completed."""
    tokens: int = 0
    """Training tokens seen, all ranks together."""
    seconds: float = 0.0
    """Time spent in training steps, over all processes of this run."""
    epoch_loss: float = 0.0
    """Sum of the step losses of the unfinished mini-epoch."""
    epoch_loss_steps: int = 0
    """Steps in that sum."""
    restart_step: int = 0
    """Where bare weights rwkv-N.pth were taken up, 0 = nowhere: warmup and epoch_save count from
    here."""


@dataclass(frozen=True)
class SavedState:
    """What a resume state holds, as read from the disk."""

    folder: Path
    model: dict[str, Tensor]
    """All weights, or those of the adapter where one is trained."""
    base: Base | None
    """What the adapter belongs to."""
    optimizer: dict[str, Tensor]
    rng: Tensor
    """Of torch's generator on the CPU."""
    recipe: dict[str, Any]
    loss_scale: dict[str, Any]
    """Of the fp16 scaler; empty in other precisions."""


def read_state(folder: Path) -> SavedState:
    """Take in a resume state that newest_resume_state has found to be whole; memory-mapped."""
    tensors, meta = load_resume_state(folder, verify=False)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return SavedState(
        folder,
        parts["model"],
        Base(**meta["base"]) if meta.get("base") else None,
        parts["optimizer"],
        parts["rng"]["cpu"],
        meta["recipe"],
        meta["loss_scale"],
    )


@dataclass
class RunState:
    model: nn.Module
    optimizer: Any
    """As Fabric hands it out: a torch optimizer in a wrapper."""
    recipe: Any
    """Anything with state_dict() -> JSON-able dict and load_state_dict(dict)."""
    progress: Progress
    settings: dict[str, Any]
    """What must not change at resume, as JSON; see config.changes_refused."""
    precision: Any
    """Fabric's precision plugin: has the state of the fp16 loss scaler."""
    adapter: Adapter | None = None
    """What is trained beside a frozen base."""
    writer: Writer = field(default_factory=Writer)
    zero: ZeroEngine | None = None
    """Where DeepSpeed runs model and optimizer."""

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by its upstream name, fp32, sharded where the model is; only those of the
        adapter where there is one."""
        weights = unwrapped(self.model).state_dict() if self.zero is None else self.zero.weights()
        names = weights if self.adapter is None else self.adapter.tensors
        return {name: weights[name].detach() for name in names}

    def write_weights(self, run_folder: Path, label: str, *, dtype: str, write: bool) -> None:
        """Write what others read: rwkv-<label>.pth, or with an adapter the folder adapter-<label>,
        for its base is a file already. Ranks with write=False only help gathering.

        label: init, the number of a mini-epoch, or final.  dtype: of the tensors in the file.
        """
        if self.adapter is not None and label == "init":
            return
        named = {f"model.{name}": t for name, t in self.weights().items()}
        taken = self.writer.take(self.progress.step, named, write=write)
        weights = {name.removeprefix("model."): t for name, t in taken.items()}
        adapter = self.adapter
        if adapter is None:
            path = run_folder / f"rwkv-{label}.pth"
            self.writer.run(lambda: save_weights(path, weights, dtype=dtype, write=write))
        elif write:
            model: Any = unwrapped(self.model)
            folder = run_folder / f"adapter-{label}"
            self.writer.run(lambda: adapter.save(model, weights, folder))

    def save(self, run_folder: Path, *, write: bool) -> Path:
        """Write a resume state for the present step; ranks with write=False only help gathering."""
        tensors = {f"model.{name}": t for name, t in self.weights().items()}
        of_optimizer = (
            optimizer_state_to_tensors(self.optimizer, unwrapped(self.model))
            if self.zero is None
            else self.zero.optimizer_state()
        )
        tensors |= {f"optimizer.{name}": t for name, t in of_optimizer.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        meta = {
            "progress": dataclasses.asdict(self.progress),
            "settings": self.settings,
            "recipe": copy.deepcopy(self.recipe.state_dict()),
            "loss_scale": self.precision.state_dict(),
            "base": dataclasses.asdict(self.adapter.base) if self.adapter else None,
        }
        folder = resume_folder(run_folder, self.progress.step)
        tensors = self.writer.take(self.progress.step, tensors, write=write)
        self.writer.run(lambda: save_resume_state(folder, tensors, meta, write=write))
        return folder

    def restore(self, saved: SavedState) -> None:
        """Take up all but the weights, which the model has had since before it was sharded, and the
        progress."""
        if self.zero is None:
            load_optimizer_state(self.optimizer, unwrapped(self.model), saved.optimizer)
        else:
            self.zero.restore(saved.optimizer)
        torch.set_rng_state(saved.rng)
        self.recipe.load_state_dict(saved.recipe)
        if saved.loss_scale:
            self.precision.load_state_dict(saved.loss_scale)
