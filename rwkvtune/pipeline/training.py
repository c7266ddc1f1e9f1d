"""One call of the trainer, and what it has come to."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rwkvtune.data.sampler import ShuffledOrder
from rwkvtune.errors import UserError
from rwkvtune.training.config import TrainConfig

MOST_FROM_NEXT_PASS = 0.02

PUBLISHED_WORDS = {
    "proj_dir": "work_dir",
    "epoch_count": "num_epochs",
    "epoch_steps": "steps of an epoch",
    "global_bsz": "windows per step",
    "head_size": "head_size_a",
    "flag": "asked for",
}
"""What the trainer calls by another name than the pipeline."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training has come to."""

    epoch_losses: list[float]
    """Mean training loss of each epoch so far, nats per token; nan for one that is not in the
    log."""
    val_loss: float | None
    """Of the last validation, nats per token; None without validation data."""
    steps: int
    """Optimizer steps since the beginning."""
    tokens: int
    """Training tokens since the beginning."""
    final_checkpoint: str
    """out/rwkv-final.pth"""
    checkpoints: list[str]
    """All weights in out/, from the initial to the final ones."""
    loss_curve: str
    """A picture (PNG)."""
    metrics: str
    """CSV with a line for each logged step."""

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last epoch, nats per token."""
        return self.epoch_losses[-1]


def in_even_batches(config: TrainConfig, num_tokens: int) -> TrainConfig:
    """The same with epochs that are passes over the data: as many whole steps as one needs.

    What a last batch lacks comes from the next pass. The batch is made smaller where that would be
    more than MOST_FROM_NEXT_PASS of an epoch. A line says so, and how much a pass leaves out where
    that is more than this share of the data.
    """
    from rwkvtune.training.fabric import processes_asked_for

    s = config.schedule
    ctx_len = config.data.ctx_len
    windows = ShuffledOrder(num_tokens, ctx_len, 0).num_slots
    shares = processes_asked_for(config.device) * s.accumulate_grad_batches

    def steps_with(micro_bsz: int) -> int:
        return -(-windows // (shares * micro_bsz))

    def from_next_pass(micro_bsz: int) -> float:
        share = steps_with(micro_bsz) * shares * micro_bsz / windows - 1
        return max(share, MOST_FROM_NEXT_PASS)

    largest = min(s.micro_bsz, -(-windows // shares))
    micro_bsz = min(range(largest, (largest - 1) // 2, -1), key=from_next_pass)
    steps = steps_with(micro_bsz)
    if micro_bsz != s.micro_bsz:
        print(
            f"micro_bsz {micro_bsz} instead of {s.micro_bsz}, so that {steps} step(s) are a pass "
            f"over the {windows} windows of the data"
        )
    if (left_out := num_tokens - 1 - windows * ctx_len) > MOST_FROM_NEXT_PASS * num_tokens:
        print(
            f"each pass leaves out {left_out} of {num_tokens} tokens, at the ends of the data and "
            f"not always the same ones: they fill no whole window of {ctx_len} more"
        )
    schedule = dataclasses.replace(s, micro_bsz=micro_bsz, epoch_steps=steps)
    output = dataclasses.replace(config.output, log_every=min(config.output.log_every, steps))
    return dataclasses.replace(config, schedule=schedule, output=output)


def run_training(config: TrainConfig) -> None:
    """Run the trainer: here for one device, in processes of their own for several, which end with
    the training. What it says against the settings comes in the pipeline's words."""
    from rwkvtune.training.fabric import processes_asked_for

    if config.output.init_only:  # the same for any number of devices
        one = dataclasses.replace(config.device, devices=1, num_nodes=1)
        config = dataclasses.replace(config, device=one)
    try:
        if processes_asked_for(config.device) > 1:
            exit_code = _in_processes(config)
        else:
            from rwkvtune.training.lm import train_language_model

            exit_code = train_language_model(config).exit_code
    except UserError as error:
        error.args = (in_published_words(str(error)),)
        raise
    if exit_code in (130, -signal.SIGINT):  # the second where Python itself was still starting
        has_state = next(Path(config.output.proj_dir).glob("resume/*"), None) is not None
        raise KeyboardInterrupt(
            "stopped and saved: train(..., continue_training=True) goes on"
            if has_state
            else "stopped before the first step: nothing was saved"
        )
    if exit_code > 128:  # stopped by another signal than Ctrl-C
        raise SystemExit(exit_code)
    if exit_code:
        raise RuntimeError(f"the training failed, exit code {exit_code}: what it printed says why")


def in_published_words(message: str) -> str:
    """A message of the trainer with flags as fields, and the pipeline's names; parts of paths stay
    as they are."""
    message = re.sub(r"(?<!\S)--(?=[a-z_]+\b)", "", message)
    names = "|".join(PUBLISHED_WORDS)
    return re.sub(
        rf"(?<![\w./-])({names})(?![\w/-]|\.\w)", lambda name: PUBLISHED_WORDS[name[1]], message
    )


def _in_processes(config: TrainConfig) -> int:
    """Run `rwkvtune train`; the exit code, or UserError with what it said was wrong.

    Not here: the trainer starts the script that called it once for each further device, which would
    do all that stands before the training again, and ends all of them afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.yaml"  # JSON is YAML
        settings.write_text(json.dumps(config.to_flat()), encoding="utf-8")
        command = [sys.executable, "-m", "rwkvtune", "train", "--config", str(settings)]
        error = ""
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches it once, from here
        ) as process:
            assert process.stdout is not None
            has_ended = False
            while not has_ended:
                try:
                    for line in process.stdout:
                        print(line, end="")
                        if line.startswith("error: "):
                            error = line.removeprefix("error: ").strip()
                    has_ended = True
                except KeyboardInterrupt:  # it saves, says so and ends
                    os.killpg(process.pid, signal.SIGINT)
    if process.returncode == 2 and error:
        raise UserError(error)
    return process.returncode


def training_result(output_dir: Path, checkpoints: list[str]) -> TrainingResult:
    """Of the run in a folder, from its logs."""
    from rwkvtune.training.log import read_metrics

    metrics = output_dir / "metrics.csv"
    rows = [row.values for row in read_metrics(metrics)]
    val_losses = [v for row in rows if (v := row.get("val_loss", float("nan"))) == v]
    return TrainingResult(
        _epoch_losses(output_dir / "train_log.txt"),
        val_losses[-1] if val_losses else None,
        int(rows[-1]["step"]),
        int(rows[-1]["tokens"]),
        str(output_dir / "rwkv-final.pth"),
        checkpoints,
        str(output_dir / "loss_curve.png"),
        str(metrics),
    )


def _epoch_losses(train_log: Path) -> list[float]:
    """Mean loss of each epoch, from lines `<epoch> <loss> ...`; the last of several counts."""
    lines = train_log.read_text(encoding="utf-8").splitlines()
    found = (re.match(r"(\d+) (\S+) \S+ \S+ ", line) for line in lines)
    losses = {int(match[1]): float(match[2]) for match in found if match}
    return [losses.get(epoch, float("nan")) for epoch in range(max(losses, default=-1) + 1)]
