"""Headings of a flock: a Vicsek model is simulated, a model learns its headings, and its forecasts
of the next heading are compared with two simple ones.

In a Vicsek model (Vicsek et al. 1995, Phys. Rev. Lett. 75, 1226) each particle takes the mean
heading of all within reach, itself included, plus noise, and moves on. That mean is not in a single
particle's headings, but all its past ones tell more about it than the last one does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from rwkvtune.errors import report
from rwkvtune.pipeline import (
    AngleTokenizer,
    DataConfig,
    ModelConfig,
    RWKVTrainingPipeline,
    TrainingConfig,
)

PARTICLES, BOX, REACH, SPEED, NOISE_DEGREES = 20, 2.0, 1.0, 0.1, 60
SETTLING_STEPS = 20
"""Until a flock has formed; not recorded."""
KNOWN = 8
"""Headings that come before the first one whose forecast is judged."""


def simulate(flocks: int, steps: int, seed: int) -> np.ndarray:
    """Headings in whole degrees, 0 to 359: [flocks * PARTICLES, steps].

    Each row is turned by an angle of its own: the model's laws know no direction.
    """
    random = np.random.default_rng(seed)
    place = random.uniform(0, BOX, (flocks, PARTICLES, 2))
    heading = random.uniform(0, 2 * np.pi, (flocks, PARTICLES))
    recorded = []
    for _ in range(SETTLING_STEPS + steps):
        apart = place[:, :, None] - place[:, None]  # [flocks, P, P, 2]
        apart -= BOX * np.round(apart / BOX)  # the box has no walls
        near = (apart**2).sum(-1) < REACH**2
        mean = np.angle(np.einsum("fij,fj->fi", near, np.exp(1j * heading)))
        half = np.deg2rad(NOISE_DEGREES) / 2
        heading = mean + random.uniform(-half, half, mean.shape)
        place = (place + SPEED * np.stack([np.cos(heading), np.sin(heading)], -1)) % BOX
        recorded.append(heading)
    rows = np.stack(recorded[SETTLING_STEPS:], -1).reshape(flocks * PARTICLES, steps)
    turned = np.rad2deg(rows) + random.uniform(0, 360, (len(rows), 1))
    whole: np.ndarray = np.round(turned).astype(np.int64) % 360
    return whole


def error(forecast: np.ndarray, truth: np.ndarray) -> float:
    """Mean angle between the two, degrees, 0 to 180."""
    return float(np.abs((forecast - truth + 180) % 360 - 180).mean())


def compare(pipeline: RWKVTrainingPipeline, headings: np.ndarray) -> dict[str, float]:
    """Mean error, degrees, of the model's forecasts and of two simple ones, on headings that it was
    not trained on, [rows, steps]."""
    probabilities = pipeline.next_value_probabilities(headings)[:, KNOWN - 1 : -1]
    # Of all forecasts the mean direction of what may come is close to the least wrong.
    directions = np.exp(1j * np.deg2rad(np.arange(360)))
    forecast = np.rad2deg(np.angle(probabilities @ directions))
    truth = headings[:, KNOWN:]
    return {
        "model": error(forecast, truth),
        "copy of the last heading": error(headings[:, KNOWN - 1 : -1], truth),
        "best constant": min(error(np.array(angle), truth) for angle in range(360)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train on the headings of simulated flocks and compare forecasts."
    )
    parser.add_argument("--work_dir", default="out/vicsek")
    parser.add_argument("--flocks", type=int, default=64, help="simulated to train on")
    parser.add_argument("--steps", type=int, default=64, help="headings of each particle")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--n_embd", type=int, default=64)
    args = parser.parse_args(argv)
    pipeline = RWKVTrainingPipeline(
        args.work_dir,
        ModelConfig("x070", n_layer=2, n_embd=args.n_embd, ctx_len=args.steps + 1, head_size_a=32),
        TrainingConfig(
            lr_init=4e-3,
            lr_final=1e-4,
            micro_bsz=32,
            grad_cp=0,
            precision="fp32",
            epoch_save=0,
            reset_at_documents=True,
        ),
        DataConfig(val_share=0.05),
        tokenizer=AngleTokenizer(),
    )
    try:
        pipeline.train(simulate(args.flocks, args.steps, seed=1), num_epochs=args.epochs)
        errors = compare(pipeline, simulate(8, args.steps, seed=2))
    except Exception as problem:
        return report(problem)
    print("\nmean error of the next heading, degrees")
    for name, degrees in errors.items():
        print(f"  {name:<26}{degrees:7.2f}")
    margin = 1 - errors["model"] / min(v for name, v in errors.items() if name != "model")
    print(f"  the model's error is {margin:.1%} below the better of the two")
    return 0
