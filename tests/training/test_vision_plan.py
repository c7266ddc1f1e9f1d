"""Steps of a vision run as its published numbers have them, and what does not fit into memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkvtune.errors import UserError
from rwkvtune.models import RWKV7Config
from rwkvtune.models.vision.config import AdapterConfig
from rwkvtune.training import vision
from rwkvtune.training.vision import train_vision
from rwkvtune.training.vision_config import VisionConfig, from_flat
from rwkvtune.training.vision_plan import VisionSizes, largest_fitting, make_plan, memory_estimate
from tests.vision_files import settings


@pytest.mark.parametrize(
    ("micro_bsz", "devices", "epoch_steps", "global_bsz", "steps", "samples"),
    [
        (32, 8, 18605, 256, 2325, 595_200),  # the authors' stage 1 (595,360 before the last part)
        (16, 8, 39038, 128, 4879, 624_512),  # their stage 2
        (256, 1, 10000, 256, 10000, 2_560_000),  # the published command
    ],
)
def test_epoch_steps_are_micro_batches_over_all_devices(
    micro_bsz: int, devices: int, epoch_steps: int, global_bsz: int, steps: int, samples: int
) -> None:
    config = VisionConfig(micro_bsz=micro_bsz, epoch_steps=epoch_steps)
    plan, notes = make_plan(config, world_size=devices, num_samples=595_375, tokens_per_sample=760)
    assert (plan.global_bsz, plan.total_steps) == (global_bsz, steps)
    assert plan.total_steps * plan.global_bsz == samples
    left = epoch_steps % devices
    assert notes == ([] if not left else [notes[0]]) and (
        not left or f"{left} are left" in notes[0]
    )


def test_accumulation_and_mini_epochs_count_in_optimizer_steps() -> None:
    config = VisionConfig(micro_bsz=32, accumulate_grad_batches=8, epoch_steps=10000, epoch_count=3)
    plan, _ = make_plan(config, world_size=2, num_samples=9, tokens_per_sample=760)
    assert (plan.epoch_steps, plan.total_steps, plan.global_bsz) == (625, 1875, 512)
    named = VisionConfig(micro_bsz=32, global_bsz=512, epoch_steps=10000, epoch_count=3)
    assert make_plan(named, world_size=2, num_samples=9, tokens_per_sample=760)[0] == plan


def test_without_epoch_steps_a_mini_epoch_is_one_pass() -> None:
    plan, _ = make_plan(
        VisionConfig(micro_bsz=256), world_size=1, num_samples=595_375, tokens_per_sample=760
    )
    assert plan.total_steps == 2325
    few, _ = make_plan(VisionConfig(micro_bsz=8), world_size=1, num_samples=3, tokens_per_sample=9)
    assert few.total_steps == 1


SIZES = VisionSizes(
    RWKV7Config(65536, 32, 2560), AdapterConfig(1152, 2560, 10240), 413_000_000, 442_368, 768, 20.0
)
"""The published command's: 2.9B, so400m, 729 tokens of a picture and a caption."""


def test_the_published_command_is_known_not_to_fit_and_what_does() -> None:
    config = VisionConfig(micro_bsz=256, grad_cp=True, quant="4bit", precision="bf16")
    needed = memory_estimate(config, SIZES, "cuda")
    # By hand: of each of 32 blocks two fp32 tensors of 256 x 768 tokens of width 2560 stay.
    assert needed > 32 * 2 * 256 * 768 * 2560 * 4 > 80e9
    plan, _ = make_plan(config, world_size=1, num_samples=9, tokens_per_sample=760)
    fitting = largest_fitting(config, plan, SIZES, "cuda", int(80e9))
    assert fitting is not None
    micro_bsz, accumulate, bytes_ = fitting
    assert micro_bsz * accumulate == 256 and bytes_ < 80e9 and micro_bsz < 256
    assert largest_fitting(config, plan, SIZES, "cuda", int(1e9)) is None


def test_packing_and_freezing_show_in_the_estimate() -> None:
    def needed(**changes: object) -> float:
        base = {"micro_bsz": 1, "grad_cp": True, "precision": "bf16"}
        return memory_estimate(VisionConfig(**{**base, **changes}), SIZES, "cuda")  # type: ignore[arg-type]

    projections = 12 * 2560**2 * 32
    packed = needed(quant="none") - needed(quant="nf4")
    assert packed == pytest.approx(projections * (2 - 4.5 / 8), rel=1e-6)
    assert needed(train_step="adapter rwkv") > needed() + 10 * projections


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_says_when_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vision, "free_memory", lambda kind: 1_000_000)
    assert train_vision(from_flat(settings(tmp_path, epoch_steps=1))) == 0
    assert "THIS DOES NOT FIT: the device has 0.0 GB; try --grad_cp 1" in capsys.readouterr().out


def test_a_global_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="no multiple of micro_bsz 3 x 2 devices = 6"):
        make_plan(
            VisionConfig(micro_bsz=3, global_bsz=16), world_size=2, num_samples=9,
            tokens_per_sample=9,
        )  # fmt: skip
