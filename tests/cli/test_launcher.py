"""How many processes a run has, from what launchers put into the environment."""

from __future__ import annotations

import dataclasses

import pytest

from rwkvtune.cli.launcher import for_launcher, vision_for_launcher
from rwkvtune.errors import UserError
from rwkvtune.training.config import DeviceOptions, TrainConfig
from rwkvtune.training.vision_config import VisionConfig

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0",
}  # fmt: skip
# As `srun --nodes=2 --ntasks-per-node=4` sets them (slurm.schedmd.com/srun.html, output variables).
SRUN = {
    "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}  # fmt: skip
BY_HAND = {
    "WORLD_SIZE": "4", "LOCAL_RANK": "1", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


def devices(environment: dict[str, str], **options: object) -> tuple[object, int]:
    device = dataclasses.replace(DeviceOptions(), **options)  # type: ignore[arg-type]
    config = dataclasses.replace(TrainConfig(), device=device)
    d = for_launcher(config, dict(environment)).device
    return d.devices, d.num_nodes


def test_the_numbers_of_a_launcher_are_taken_over() -> None:
    assert devices({}) == ("auto", 1)
    assert devices({}, devices=3) == (3, 1)
    for environment in (TORCHRUN, SRUN):
        assert devices(environment) == (4, 2)
        assert devices(environment, devices=4, num_nodes=2) == (4, 2)
    assert devices(BY_HAND, devices=2, num_nodes=2) == (2, 2)


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize("options", [{"devices": 1}, {"devices": 8}, {"num_nodes": 4}])
def test_flags_that_say_other_numbers_are_refused(
    environment: dict[str, str], options: dict[str, int]
) -> None:
    with pytest.raises(UserError, match="has started 4 processes on each of 2 machines, but"):
        devices(environment, **options)


def test_the_devices_of_a_launcher_take_the_place_of_a_published_default() -> None:
    """Published programs train on one device unless they are told otherwise."""
    config = TrainConfig(device=DeviceOptions(devices=1))
    device = for_launcher(config, dict(TORCHRUN), is_default=True).device
    assert (device.devices, device.num_nodes) == (4, 2)
    vision = vision_for_launcher(VisionConfig(), dict(TORCHRUN), is_default=True)
    assert (vision.devices, vision.num_nodes) == (4, 2)
    assert vision_for_launcher(VisionConfig(), {}, is_default=True).devices == 1
    with pytest.raises(UserError, match="has started 4 processes on each of 2 machines, but"):
        vision_for_launcher(VisionConfig(), dict(TORCHRUN), is_default=False)
    with pytest.raises(UserError, match="no launcher is known"):
        vision_for_launcher(VisionConfig(), {"WORLD_SIZE": "2"}, is_default=True)


def test_a_batch_script_of_one_task_and_a_shell_start_their_own_processes() -> None:
    alone = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"}
    assert devices(alone, devices=4) == (4, 1)
    assert devices(SRUN | {"SLURM_JOB_NAME": "bash"}, devices=2) == (2, 1)


@pytest.mark.parametrize(
    ("environment", "options", "told"),
    [
        (TORCHRUN | {"WORLD_SIZE": "7"}, {}, "same --nproc-per-node"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, {}, "must be a number from 1 up"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, {}, "write `srun` before"),
        ({k: v for k, v in SRUN.items() if "PER_NODE" not in k}, {}, "--ntasks-per-node=4 instead"),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "3"}, {}, "8 tasks, but 3 on each of 2"),
        ({"WORLD_SIZE": "2"}, {}, "no launcher is known"),
        (BY_HAND, {"devices": 1, "num_nodes": 2}, "WORLD_SIZE=4 is set, but"),
        (BY_HAND, {}, "WORLD_SIZE=4 is set, but"),
        ({"NODE_RANK": "1"}, {}, "NODE_RANK=1 is set, but num_nodes=1"),
        ({}, {"devices": 2, "num_nodes": 2}, "MASTER_ADDR, MASTER_PORT, NODE_RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {"devices": 2}, "would each train alone"),
    ],
)
def test_what_would_train_apart_or_wait_for_ever_is_refused(
    environment: dict[str, str], options: dict[str, int], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        devices(environment, **options)
