"""What has started this process, and how many others with it: torchrun, SLURM's srun, a script that
sets the variables of torch.distributed, or nobody."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rwkvtune.errors import UserError
from rwkvtune.training.config import Config, DeviceOptions
from rwkvtune.training.vision_config import VisionConfig

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
"""Of launchers whose processes would not find each other."""


@dataclass(frozen=True)
class Launch:
    """Processes that a launcher has started."""

    by: str
    local: int
    """Processes on each machine."""
    nodes: int
    """Machines."""
    local_rank: int
    """Of this process among those on its machine."""


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """What the launcher says in the environment; None where the run starts its own processes.

    UserError for variables of which nobody could say which processes they mean: such processes
    would train apart, each a run of its own, or wait for others that never come.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        local = _number(environment, "LOCAL_WORLD_SIZE")
        world = _number(environment, "WORLD_SIZE")
        if world % local:
            raise UserError(
                f"torchrun has started {world} processes, {local} of them here, so other machines "
                "have another number: give all the same --nproc-per-node"
            )
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        return Launch("torchrun", local, world // local, local_rank)
    if _is_in_slurm(environment):
        return _slurm_launch(environment)
    for name in MPI_SIZES:
        if environment.get(name, "1") != "1":
            raise UserError(
                f"{name}={environment[name]}: mpirun has started several processes, which would "
                "each train alone; start them with torchrun or srun, or start one with --devices"
            )
    return None


def for_launcher(
    config: Config, environment: MutableMapping[str, str], *, is_default: bool = False
) -> Config:
    """The settings with the launcher's numbers of devices and machines.

    is_default: nobody has asked for this number of devices, so a launcher's may take its place.
    UserError when flags say otherwise, or when several machines are asked for and nothing says
    where they are.
    """
    numbers = _numbers(config.device, environment, is_default=is_default)
    return dataclasses.replace(config, device=dataclasses.replace(config.device, **numbers))


def vision_for_launcher(
    config: VisionConfig, environment: MutableMapping[str, str], *, is_default: bool
) -> VisionConfig:
    """The same for a vision run."""
    numbers = _numbers(config.device_options, environment, is_default=is_default)
    return dataclasses.replace(config, **numbers)


def _numbers(
    d: DeviceOptions, environment: MutableMapping[str, str], *, is_default: bool
) -> dict[str, Any]:
    launch = launch_of(environment)
    if launch is None:
        _check_own_launch(d, environment)
        # A batch script outside srun: Fabric would take it for one of srun's tasks.
        environment.pop("SLURM_NTASKS", None)
        return {}
    is_open = is_default or d.devices in ("auto", launch.local)
    if not is_open or d.num_nodes not in (1, launch.nodes):
        raise UserError(
            f"{launch.by} has started {launch.local} processes on each of {launch.nodes} machines, "
            f"but the settings are devices={d.devices} and num_nodes={d.num_nodes}: leave them out"
        )
    return {"devices": launch.local, "num_nodes": launch.nodes}


@contextmanager
def told_once() -> Iterator[None]:
    """What is refused before the processes of a launcher have met comes to each of them; the first
    one here says it."""
    try:
        yield
    except UserError:
        try:
            launch = launch_of(os.environ)
        except UserError:
            launch = None
        if launch is not None and launch.local_rank:
            sys.exit(2)
        raise


def _check_own_launch(d: DeviceOptions, environment: Mapping[str, str]) -> None:
    world = environment.get("WORLD_SIZE", "1")
    asked = None if d.devices == "auto" else d.devices * d.num_nodes
    if world != "1" and ("LOCAL_RANK" not in environment or str(asked) != world):
        raise UserError(
            f"WORLD_SIZE={world} is set, but the settings ask for devices={d.devices} on "
            f"num_nodes={d.num_nodes} and no launcher is known: use torchrun or srun, or say "
            "--devices and --num_nodes and set LOCAL_RANK, NODE_RANK, MASTER_ADDR and MASTER_PORT"
        )
    node = environment.get("NODE_RANK", "0")
    if d.num_nodes == 1 and node != "0":
        raise UserError(
            f"NODE_RANK={node} is set, but num_nodes=1: say --num_nodes, or unset NODE_RANK"
        )
    lacking = [v for v in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if v not in environment]
    if d.num_nodes > 1 and lacking:
        raise UserError(
            f"num_nodes={d.num_nodes}, but {', '.join(lacking)} is not set, so the machines would "
            "not find each other: start the run with torchrun or srun, or set these on each"
        )


def _is_in_slurm(environment: Mapping[str, str]) -> bool:
    """Whether this is a task of srun, or a batch script with several tasks. Jobs of these two names
    are shells, as in Fabric."""
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if interactive or "SLURM_NTASKS" not in environment:
        return False
    return "SLURM_STEP_ID" in environment or environment["SLURM_NTASKS"] != "1"


def _slurm_launch(environment: Mapping[str, str]) -> Launch:
    world = _number(environment, "SLURM_NTASKS")
    if "SLURM_STEP_ID" not in environment:
        raise UserError(
            f"SLURM has given this job {world} tasks, and this is its batch script, not one of "
            "them: write `srun` before the command"
        )
    nodes = _number(environment, "SLURM_NNODES", "1")
    if world > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise UserError(
            f"SLURM has started {world} tasks and does not say how many on each machine: say "
            f"--ntasks-per-node={-(-world // nodes)} instead of --ntasks={world}"
        )
    local = _number(environment, "SLURM_NTASKS_PER_NODE", "1")
    if local * nodes != world:
        raise UserError(
            f"SLURM's variables disagree: {world} tasks, but {local} on each of {nodes} machines; "
            "use --nodes and --ntasks-per-node, without --ntasks"
        )
    return Launch("srun", local, nodes, int(environment.get("SLURM_LOCALID", "0")))


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={text!r} in the environment must be a number from 1 up")
    return int(text)
