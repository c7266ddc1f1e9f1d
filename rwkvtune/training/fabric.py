"""The only file that knows Lightning Fabric: devices, precision, strategy, launch, and how a process ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from rwkvtune.errors import UserError
from rwkvtune.training.config import DeviceOptions


class Autocast(MixedPrecision):
    """Mixed precision that leaves the model's arguments alone: Fabric's own would round an fp32 WKV state."""

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data


def make_fabric(options: DeviceOptions, say: Callable[[str], None] = print) -> Fabric:
    """Turn device options into a Fabric, refusing what this machine cannot do.

    say: gets one line for each setting that does something else than its name says.
    """
    accelerator = _accelerator(options)
    devices = _device_count(options, accelerator)
    if options.precision == "fp16" and accelerator == "cpu":
        raise UserError(
            "precision=fp16 does not run on a CPU: its fp16 products are several times slower than fp32 "
            "and there is no loss scaling to keep small gradients; use --precision bf16 or fp32"
        )
    if options.precision == "tf32":
        torch.set_float32_matmul_precision("high")
        if accelerator == "cpu":
            say("precision tf32: a CPU has no tf32, so this is fp32")
    if options.threads:
        torch.set_num_threads(options.threads)
    total = devices * options.num_nodes
    # Fabric's own announcements repeat what the run prints in its table.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=options.num_nodes,
        plugins=[_precision(options.precision, accelerator)],
        strategy=_strategy(options.strategy, total, say),
    )


def _precision(name: str, accelerator: str) -> Precision:
    """bf16 and fp16 = products in that type by autocast, fp32 master weights; tf32 is fp32 with a torch setting."""
    if name in ("bf16", "fp16"):
        return Autocast("bf16-mixed" if name == "bf16" else "16-mixed", accelerator)
    return Precision()


def _accelerator(options: DeviceOptions) -> str:
    wanted = {"gpu": "cuda"}.get(options.accelerator, options.accelerator)
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"accelerator={options.accelerator}, but torch {torch.__version__} sees no GPU; "
            "use --accelerator cpu, or install a torch build for your GPU"
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("accelerator=mps, but this machine has no Apple GPU; use --accelerator cpu")
    return wanted


def _device_count(options: DeviceOptions, accelerator: str) -> int:
    there = torch.cuda.device_count() if accelerator == "cuda" else 1
    if options.devices == "auto":
        return there
    wanted = int(options.devices)
    if wanted < 1 or (accelerator == "cuda" and wanted > there):
        raise UserError(f"devices={wanted}, but this machine has {there} for {accelerator}")
    return wanted


def _strategy(name: str, total_devices: int, say: Callable[[str], None]) -> Any:
    """Published names on torch's own engines: DDP, or FSDP2 where parameters or gradients are sharded."""
    if total_devices == 1:
        if name not in ("auto", "ddp"):
            say(f"strategy {name}: one device has nothing to shard, so this is a plain run")
        return "auto"
    if name.startswith("deepspeed"):
        engine = "ddp" if name == "deepspeed_stage_1" else "fsdp"
        say(f"strategy {name}: runs on torch's own {engine}; same mathematics")
        name = engine
    if name == "fsdp":
        return ModelParallelStrategy(_shard_blocks)
    return DDPStrategy(gradient_as_bucket_view=True)


def _shard_blocks(model: Any, device_mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = device_mesh["data_parallel"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what Fabric and DDP put around it."""
    while hasattr(model, "module"):
        model = model.module
    return model


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one piece, gathered when it is sharded. Every rank must call this for every tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def finish(fabric: Fabric, code: int) -> None:
    """End a distributed process with `code`; return at once in a plain one.

    gloo processes often abort while Python shuts down, after all work is done ("terminate called without an
    active exception"); leaving through os._exit skips the destructors that do it. Loggers must be closed by now.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if code == 0:
        fabric.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
