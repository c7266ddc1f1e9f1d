"""The only file that knows Lightning Fabric: devices, precision, strategy, launch, and how the
processes of a run end."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning_fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rwkvtune.errors import UserError, report
from rwkvtune.models.frame import Block
from rwkvtune.training.config import DeviceOptions
from rwkvtune.training.zero import ZeroEngine, is_installed, lacking


class Autocast(MixedPrecision):
    """Mixed precision that leaves the model's arguments alone: Fabric's own would round an fp32 WKV
    state."""

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data


def make_fabric(options: DeviceOptions, say: Callable[[str], None] = print) -> Fabric:
    """Turn device options into a Fabric, refusing what this machine cannot do.

    say: gets one line for each setting that does something else than its name says.
    """
    accelerator = _accelerator(options, say)
    devices = _device_count(options, accelerator)
    if options.precision == "fp16" and accelerator == "cpu":
        raise UserError(
            "precision=fp16 does not run on a CPU: its fp16 products are several times slower than "
            "fp32 and there is no loss scaling to keep small gradients; use --precision bf16 or "
            "fp32"
        )
    if options.precision == "tf32":
        if accelerator == "cuda":
            torch.set_float32_matmul_precision("high")
        else:
            say(f"precision tf32: a {accelerator} device has no tf32, so this is fp32")
    # Fabric's own announcements repeat what the run prints in its table.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=options.num_nodes,
        plugins=[_precision(options.precision, accelerator)],
        strategy=_strategy(options, devices * options.num_nodes, accelerator, say),
    )


def processes_asked_for(options: DeviceOptions) -> int:
    """planned_world_size without a Fabric, which for several devices a notebook may not make."""
    accelerator = _accelerator(options, say=lambda line: None)
    return _device_count(options, accelerator) * options.num_nodes


def _precision(name: str, accelerator: str) -> Precision:
    """bf16 and fp16 = products in that type by autocast, fp32 master weights; tf32 is fp32 with a
    torch setting."""
    if name in ("bf16", "fp16"):
        return Autocast("bf16-mixed" if name == "bf16" else "16-mixed", accelerator)
    return Precision()


def _accelerator(options: DeviceOptions, say: Callable[[str], None]) -> str:
    wanted = options.accelerator
    if wanted in ("auto", "gpu"):
        found = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "gpu" and found == "cpu":
            say(
                f"accelerator gpu: torch {torch.__version__} sees no GPU, so this runs on the CPU, "
                "with the same mathematics"
            )
        return found
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"accelerator=cuda, but torch {torch.__version__} sees no GPU; "
            "use --accelerator cpu, or install a torch build for your GPU"
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("accelerator=mps, but this machine has no Apple GPU; use --accelerator cpu")
    return wanted


def _device_count(options: DeviceOptions, accelerator: str) -> int:
    there = torch.cuda.device_count() if accelerator == "cuda" else 1
    if options.devices == "auto":
        return there
    if accelerator != "cpu" and options.devices > there:
        raise UserError(
            f"devices={options.devices}, but this machine has {there} for {accelerator}; "
            f"use --devices {there}"
        )
    return options.devices


def _strategy(
    device: DeviceOptions, total_devices: int, accelerator: str, say: Callable[[str], None]
) -> Any:
    """DDP, torch's FSDP2 where something is sharded, or DeepSpeed where it is there and named."""
    name = device.strategy
    if total_devices == 1:
        if name not in ("auto", "ddp"):
            say(
                f"strategy {name}: one device has nothing to shard, so this is a plain run, with "
                "the same mathematics"
            )
        return "auto"
    if name in ("auto", "ddp"):
        # Buffers are packed weights, which no step changes. The newer torch has the newer name.
        accepted = inspect.signature(DistributedDataParallel).parameters
        newer, older = "forward_sync_buffers", "broadcast_buffers"
        options: dict[str, Any] = {newer if newer in accepted else older: False}
        return DDPStrategy(gradient_as_bucket_view=True, **options)
    stage, offloads = name.removesuffix("_offload"), name.endswith("_offload")
    if offloads and accelerator == "cpu":
        say(f"strategy {name}: a CPU run has everything in the machine's memory already")
    if stage in _SHARDED:
        if runs_on_deepspeed(device, total_devices):
            say(f"strategy {name}: runs on DeepSpeed, which builds a part of itself first")
            return ZeroStrategy(stage=int(stage[-1]), offload=offloads)
        why = f" ({lacking()})" if device.engine == "auto" and is_installed() else ""
        say(
            f"strategy {name}: runs without DeepSpeed{why}, on torch's own FSDP2, with the same "
            f"mathematics; sharded are {_SHARDED[stage]}"
        )
    if accelerator == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(
            f"strategy={name}: FSDP2 of torch {torch.__version__} does not run on CPUs, which that "
            "of later versions does: use --strategy ddp"
        )
    shard = partial(_shard_blocks, keep_gathered=stage == "deepspeed_stage_1", offload=offloads)
    # Clipping adds up norms of gradients that lie in the machine's memory: gloo does that.
    backend = "cpu:gloo,cuda:nccl" if offloads and accelerator == "cuda" else None
    return ModelParallelStrategy(
        shard,
        data_parallel_size=total_devices,
        tensor_parallel_size=1,
        process_group_backend=backend,
    )


class ZeroStrategy(DDPStrategy):
    """DeepSpeed's engine in the place of DDP's wrapper, in a process group of our own making: on
    CPUs too, which Fabric's strategy for it refuses."""

    def __init__(self, *, stage: int, offload: bool) -> None:
        super().__init__()
        self._stage, self._offload = stage, offload
        self._backward_sync_control = _ZeroSteps()
        self.grad_clip = 0.0
        self.zero: ZeroEngine | None = None

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Any], scheduler: Any = None
    ) -> tuple[Any, list[Any], Any]:
        is_half = isinstance(self.precision, Autocast)
        self.zero = ZeroEngine(
            module,
            optimizers[0],
            stage=self._stage,
            offload=self._offload,
            products=torch.bfloat16 if is_half else torch.float32,
            grad_clip=self.grad_clip,
        )
        return self.zero.engine, [self.zero.optimizer], scheduler

    def backward(self, tensor: torch.Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        assert self.zero is not None
        self.zero.engine.backward(tensor)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> None:
        assert self.zero is not None
        self.zero.engine.step()  # clips, moves, and takes the gradients away


class _ZeroSteps(_BackwardSyncControl):
    @contextmanager
    def no_backward_sync(self, module: Any, enabled: bool) -> Iterator[None]:
        module.set_gradient_accumulation_boundary(not enabled)
        yield


def runs_on_deepspeed(device: DeviceOptions, world_size: int) -> bool:
    """Whether strategy and engine come to DeepSpeed here. UserError where they ask for it and it
    cannot run."""
    if world_size == 1 or device.engine == "torch":
        return False
    if not device.strategy.startswith("deepspeed_stage_"):
        return False
    reason = "precision=fp16 has its own loss scaling" if device.precision == "fp16" else lacking()
    if reason and device.engine == "deepspeed":
        raise UserError(
            f"engine=deepspeed does not run here: {reason}; `--engine torch` shards with the same "
            "mathematics"
        )
    return not reason


def zero_of(fabric: Fabric) -> ZeroEngine | None:
    """DeepSpeed's engine of a run that is set up; None for other engines."""
    strategy = fabric.strategy
    return strategy.zero if isinstance(strategy, ZeroStrategy) else None


def set_up(
    fabric: Fabric,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Any],
    *,
    grad_clip: float,
) -> tuple[nn.Module, Any]:
    """(the model to call, its optimizer), on their devices and sharded as the strategy says.

    make_optimizer: gets the model with the parameters that it will be trained with.
    """
    strategy = fabric.strategy
    if isinstance(strategy, ZeroStrategy):
        strategy.grad_clip = grad_clip
        wrapped, optimizer = fabric.setup(model, make_optimizer(model))
        return wrapped, optimizer
    wrapped = fabric.setup_module(model)  # sharding makes new parameters
    return wrapped, fabric.setup_optimizers(make_optimizer(unwrapped(wrapped)))


_SHARDED = {
    "deepspeed_stage_1": "optimizer states, and gradients between steps; weights stay whole while "
    "a step runs",
    "deepspeed_stage_2": "optimizer states, gradients and weights",
    "deepspeed_stage_3": "optimizer states, gradients and weights",
}


def _shard_blocks(
    model: Any, device_mesh: Any, keep_gathered: bool = False, offload: bool = False
) -> Any:
    """One unit per block, gathered just before the block runs; the rest belongs to the model.

    keep_gathered: a block's weights stay whole from its forward to its backward pass, which saves
    the second gathering; what lives between two steps is sharded all the same.
    offload: the shards and the optimizer's states rest in the machine's memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    # A block hands on its input's value as it is, and nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options: dict[str, Any] = {"mesh": device_mesh["data_parallel"]}
    if keep_gathered:
        options["reshard_after_forward"] = False
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    # The model calls ln0 before block 0.
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for unit in (blocks[0].ln0, *blocks):
        fully_shard(unit, **options)
    return fully_shard(model, **options)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what Fabric and DDP put around it."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def sequence_group(fabric: Fabric, size: int) -> Any:
    """The `size` neighbouring ranks that share this rank's sequences; None for 1. All processes
    have to call this."""
    if size == 1:
        return None
    ranks = range(fabric.world_size)
    own, _ = torch.distributed.new_subgroups_by_enumeration(
        [list(ranks[first : first + size]) for first in range(0, len(ranks), size)]
    )
    return own


def planned_world_size(fabric: Fabric) -> int:
    """Processes that the run will have, known before they are launched."""
    strategy = fabric.strategy
    return int(getattr(strategy, "num_processes", 1) * getattr(strategy, "num_nodes", 1))


@contextmanager
def launched(fabric: Fabric, *, threads: int, same_for_all: str) -> Iterator[None]:
    """Start the other processes of a distributed run, and see that none outlives another.

    threads: CPU threads of each process; 0 = torch's choice.
    same_for_all: what every process must have worked out alike, such as where the run starts from;
    UserError when one did not. An error in any process ends all of them: the first to fail says
    why, and the run's exit code is not zero. Leaving the block does not end a process: see finish.
    """
    try:
        _meet_apart_from_earlier_attempts(fabric)
        fabric.launch()
        if threads:  # after the launch, which sets its own number
            torch.set_num_threads(threads)
        if _is_distributed():
            environment = getattr(fabric.strategy, "cluster_environment", None)
            if isinstance(environment, LightningEnvironment) and environment.local_rank() > 0:
                watch = threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True)
                watch.start()
            _check_same(fabric, same_for_all)
        yield
    except BaseException as error:
        is_first = _is_distributed() and _is_first_to_fail()
        code = report(error) if is_first else 1
        _flush()
        children: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
        deadline = time.monotonic() + (0.0 if is_first else GRACE_S)
        for child in children:
            with suppress(subprocess.TimeoutExpired):  # it may be telling why it failed
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
            child.kill()
        if _is_distributed():
            os._exit(code or 1)
        raise


def _meet_apart_from_earlier_attempts(fabric: Fabric) -> None:
    """Make the process group of a restart by torchrun, whose store still has the addresses of the
    ranks that are gone: a rank that reads such a one gives up after some seconds.

    Only where one agent runs all ranks: several count their restarts apart.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not is_shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False)
    backend = getattr(fabric.strategy, "process_group_backend", None)
    torch.distributed.init_process_group(
        backend or ("nccl" if fabric.device.type == "cuda" else "gloo"),
        store=torch.distributed.PrefixStore(f"rwkvtune/attempt-{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


GRACE_S = 3.0
"""Seconds that the other processes get to end by themselves after one has failed."""


def _is_first_to_fail() -> bool:
    """Whether no other process has reported the end of the run yet."""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return int(store.add("rwkvtune/failed", 1)) == 1
    except Exception:  # the process that keeps the store is gone, and it reports for itself
        return torch.distributed.get_rank() == 0


def _leave_with(parent: int) -> None:
    """End this process soon after its parent, which it would else await in a collective, for half
    an hour on GPUs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _check_same(fabric: Fabric, mine: str) -> None:
    found: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, mine)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"the processes of this run disagree: rank 0 has {found[0]}; rank {rank} has "
                f"{other}. All machines need the same data and settings, and one proj_dir that "
                "they share"
            )


def finish(fabric: Fabric, code: int) -> None:
    """End a distributed process in order; return at once in a plain one. Loggers must be closed.

    All processes have to call this. gloo processes often abort while Python shuts down, after all
    work is done ("terminate called without an active exception"); leaving through os._exit skips
    the destructors that do it. Only rank zero leaves with `code`: a launcher takes any other code
    than 0 of the others for a crash.
    """
    if not _is_distributed():
        return
    fabric.barrier()
    torch.distributed.destroy_process_group()
    _flush()
    os._exit(code if fabric.is_global_zero else 0)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
