"""Run folders as training leaves them, of made-up numbers."""

from __future__ import annotations

import io
import math
from pathlib import Path

from rwkvtune.training.log import RunLog

SOURCES = ("val_loss/plays", "val_loss/poems")


def loss_at(step: int) -> float:
    return 2 + 3 / step + 0.1 * math.sin(7 * step)


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    validate_every: int = 10,
    layers: int = 2,
    scale: float = 1.0,
    sources: tuple[str, ...] = (),
    settings: str = "n_layer: 2\nlr_init: 0.001\nproj_dir: somewhere\n",
) -> Path:
    """Write metrics.csv, layers.csv (layers > 0) and config.yaml; returns the folder."""
    log = RunLog(folder, total_steps=steps, extra_columns=sources, stream=io.StringIO())
    log.start({}, "name")
    for step in range(1, steps + 1):
        if validate_every and step % validate_every == 0:
            per_source = dict.fromkeys(sources, 3 + 1 / step)
            log.validation({"step": step, "val_loss": scale * (2.5 + 1 / step), **per_source})
        blocks = [
            {
                "att_grad_norm": 0.1 * (i + 1),
                "ffn_grad_norm": 0.2 / (i + 1),
                "decay_min": 0.6,
                "decay_mean": 0.8 + 0.01 * i,
                "decay_max": 0.99,
            }
            for i in range(layers)
        ]
        log.layers(step, blocks)
        log.step(
            {
                "step": step,
                "epoch": 0,
                "tokens": 512 * step,
                "loss": scale * loss_at(step),
                "lr": scale * 1e-3 / step,
                "weight_decay": 0.1,
                "grad_norm": scale + 1 / step,
                "tokens_per_s": scale * 900.0,
                "seconds": step / 2,
            }
        )
    log.close()
    (folder / "config.yaml").write_text(settings)
    return folder
