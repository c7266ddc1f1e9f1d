"""DeepSpeed's ZeRO under a run of ours: the same steps, and a state by parameter name that any
number of processes and any strategy goes on from."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkvtune.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps for each number."""


def is_installed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def lacking() -> str:
    """What DeepSpeed needs and this machine does not have, in a sentence; empty when nothing is."""
    if not is_installed():
        return "the package deepspeed is not installed (pip install deepspeed ninja)"
    # pip puts ninja beside the python that is running, which need not be on the PATH.
    places = os.pathsep.join([os.defpath, os.path.dirname(sys.executable)])
    found = {
        "ninja": shutil.which("ninja") or shutil.which("ninja", path=places),
        "a C++ compiler (g++)": shutil.which("g++") or shutil.which("clang++"),
    }
    missing = [name for name, path in found.items() if path is None]
    if missing:
        return f"it builds parts of itself when it starts, and {' and '.join(missing)} is missing"
    return ""


class ZeroEngine:
    """A model and its AdamW, sharded by DeepSpeed over all processes; the group must exist.

    stage: 1 shards the optimizer's states, 2 also gradients, 3 also weights.  offload: what is
    sharded rests in the machine's memory.  products: the type of matrix products under autocast;
    weights, gradients and moments are fp32.  grad_clip: largest global gradient norm, 0 = any.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        stage: int,
        offload: bool,
        products: torch.dtype,
        grad_clip: float,
    ) -> None:
        folder = os.path.dirname(sys.executable)
        if shutil.which("ninja") is None:
            os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], folder])
        device = next(model.parameters()).device.type
        if device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        zero: dict[str, Any] = {"stage": stage}
        if offload and device != "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its own would be compiled, for minutes
            "gradient_clipping": grad_clip,
        }
        if products != torch.float32:
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": str(products).removeprefix("torch."),
                "lower_precision_safe_modules": [],  # gradients and weights travel in fp32
            }
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.engine: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=config,
            dist_init_required=False,
        )[0]
        self.model, self.stage = model, stage

    @property
    def optimizer(self) -> Any:
        """What sets and shows the parameter groups."""
        return self.engine.optimizer

    def gradient_norm(self) -> float:
        """Of the latest step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        """All parameters by name, as `checkpoint.whole` takes them."""
        if self.stage != 3:
            return dict(self.model.state_dict())
        named: list[tuple[str, Any]] = list(self.model.named_parameters())
        sharded = {n: Gathered.of(p.ds_shape, partial(_gathered_weight, p)) for n, p in named}
        return dict(self.model.state_dict()) | sharded

    def optimizer_state(self) -> dict[str, Tensor]:
        """As optim.optimizer_state_to_tensors gives it; empty before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [state for state in self._inner.state.values() if state]
        if not states:
            return {}
        self._link_moments()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            tensors[f"step.{name}"] = torch.as_tensor(states[0]["step"]).detach().clone().cpu()
            for key in MOMENTS:
                gather = partial(safe_get_full_optimizer_state, parameter, key)
                tensors[f"{key}.{name}"] = Gathered.of(_shape(parameter), gather)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the optimizer's state of any strategy. UserError for one that does not fit."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if not tensors:
            return
        shapes = {name: _shape(p) for name, p in self._trained()}
        wanted = {f"{key}.{n}": shape for n, shape in shapes.items() for key in MOMENTS}
        for name, tensor in tensors.items():
            is_known = name in wanted or name.removeprefix("step.") in shapes
            if not is_known or wanted.get(name, ()) != tuple(tensor.shape):
                raise UserError(
                    f"this optimizer state does not fit engine=deepspeed: {name}, shape "
                    f"{tuple(tensor.shape)}. Resume with the settings of the run that wrote it"
                )
        # A parameter without a state never had a gradient: its moments are zero at any step.
        step = max(float(t) for name, t in tensors.items() if name.startswith("step."))
        flat = self.optimizer
        for part in (
            flat.fp32_partitioned_groups_flat
            if self.stage == 3
            else flat.single_partition_of_fp32_groups
        ):
            moments = {key: torch.zeros_like(part) for key in MOMENTS}
            self._inner.state[part] = {"step": torch.tensor(step, device=part.device), **moments}
        self._link_moments()
        for name, parameter in self._trained():
            for key in MOMENTS:
                if (saved := tensors.get(f"{key}.{name}")) is not None:
                    safe_set_full_optimizer_state(parameter, saved.to(part.device), key)

    def _link_moments(self) -> None:
        """Let parameters find their moments; DeepSpeed does it once, after the step of the first of
        its groups, when the others have none yet."""
        if self.stage != 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _inner(self) -> Optimizer:
        inner: Optimizer = self.engine.optimizer.optimizer
        return inner

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)


class Gathered(Tensor):
    """Stands for a tensor of which each rank has a part; `full_tensor` brings it together, which
    all ranks have to call."""

    _gather: Callable[[], Tensor]

    @classmethod
    def of(cls, shape: Sequence[int], gather: Callable[[], Tensor]) -> Gathered:
        one = torch.empty(tuple(shape), device="meta").as_subclass(cls)
        one._gather = gather
        return one

    def full_tensor(self) -> Tensor:
        return self._gather().reshape(self.shape)

    def detach(self) -> Gathered:
        return self


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also where this rank has a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _gathered_weight(parameter: Any) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        whole: Tensor = parameter.detach().clone()
    return whole
