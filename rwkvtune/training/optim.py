"""Parameter groups as RWKV-LM makes them, optimizers over them, and their state by parameter name.

AdamW is upstream's. adamw8bit keeps its two moments in 8 bits, and muon takes the matrices of time
mix and channel mix; both leave all other parameters to AdamW.
Adam adds eps outside the root, corrects the bias, and decays weights apart from the gradient, so
weight decay 0 is plain Adam. Source: RWKV-LM, `configure_optimizers` of RWKV-v5 and train_temp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rwkvtune.errors import UserError
from rwkvtune.training.config import EPS_8BIT
from rwkvtune.training.groups import LR_SCALES, STAGE2_LR_SCALES, group_of

Kind = Literal["adamw", "adamw8bit", "muon"]

BLOCK_8BIT = 256
"""Values of a moment that share a scale."""
LEAST_8BIT = 4096
"""Parameters with fewer elements keep fp32 moments, as in bitsandbytes."""


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    layerwise_lr: bool = True,
    stage2: bool = False,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: name, my_lr_scale, weight_decay, param_names and params.

    Frozen parameters are left out, empty groups too. Within a group parameters are sorted by name,
    so that the order does not depend on how the model was put together.
    layerwise_lr: False gives all parameters scale 1.
    """
    members: dict[str, dict[str, nn.Parameter]] = {name: {} for name in LR_SCALES}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = group_of(name, parameter.shape, decays=weight_decay > 0, stage2=stage2)
            members[group if layerwise_lr or group == "decay" else "1x"][name] = parameter
    scales = STAGE2_LR_SCALES if stage2 else LR_SCALES
    return [
        {
            "name": group,
            "my_lr_scale": scales[group] if layerwise_lr else 1.0,
            "weight_decay": weight_decay if group == "decay" else 0.0,
            "params": [(name, parameters[name]) for name in sorted(parameters)],
        }
        for group, parameters in members.items()
        if parameters
    ]


class JoinedOptimizer(Optimizer):
    """Several torch optimizers, each with parameters of its own, that step as one."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        # Not Optimizer's own: groups and state stay in the parts.
        self.parts = parts
        self._squares: list[Tensor] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop has none"
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step_in_backward(self) -> None:
        """From now on each part steps as soon as its gradient is complete, and drops it.

        Each part must have one parameter. UserError, out of the backward pass, for a gradient that
        is not finite; that parameter has not moved.
        """
        for part in self.parts:
            (parameter,) = (p for group in part.param_groups for p in group["params"])
            (name,) = part.param_groups[0]["param_names"]
            parameter.register_post_accumulate_grad_hook(_stepper(part, name, self._squares))

    def gradient_norm(self) -> float:
        """Global norm of the gradients that have been used since the last call."""
        norm = math.sqrt(sum(float(square) for square in self._squares))
        self._squares.clear()
        return norm


def _stepper(part: Optimizer, name: str, squares: list[Tensor]) -> Callable[[Tensor], None]:
    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        square = parameter.grad.detach().float().square().sum()
        if not math.isfinite(square):
            raise UserError(
                f"the gradient of {name} is not finite; with fused_backward other parameters of "
                "this step have moved already, so go on from the newest resume state"
            )
        squares.append(square)
        part.step()
        parameter.grad = None

    return step


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr_init: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    layerwise_lr: bool = True,
    stage2: bool = False,
    fused: bool | str = "auto",
    kind: Kind = "adamw",
    in_backward: bool = False,
) -> Optimizer:
    """An optimizer over RWKV-LM's parameter groups; set_hyperparameters sets its rates before each
    step.

    Build it after the parameters are on their device. fused: "auto" takes torch's single-pass
    kernel on CPU and CUDA; 5 times as fast as the default on 2 CPU cores with 100 M parameters.
    kind: muon takes AdamW's learning rate: its update is scaled to the size that AdamW's has.
    in_backward: step inside the backward pass, see JoinedOptimizer.step_in_backward.
    Raises UserError when nothing is trainable, or the kind does not run here.
    """
    groups = param_groups(
        named_parameters, weight_decay=weight_decay, layerwise_lr=layerwise_lr, stage2=stage2
    )
    if not groups:
        raise UserError("no parameter is trainable: all are frozen, or the model has none")
    parameters = [p for group in groups for _, p in group["params"]]
    if kind != "adamw" and any(hasattr(p, "full_tensor") for p in parameters):
        raise UserError(
            f"optimizer={kind} needs whole matrices, which a sharded run does not have: use "
            "--optimizer adamw, or --strategy ddp"
        )
    if fused == "auto":
        fused = {p.device.type for p in parameters} <= {"cpu", "cuda"}

    def adamw(groups: list[dict[str, Any]]) -> Optimizer:
        # The optimizer's own weight_decay is only a default; each group states its own.
        return AdamW(groups, lr=lr_init, betas=betas, eps=eps, weight_decay=0.0, fused=bool(fused))

    def special(groups: list[dict[str, Any]]) -> Optimizer:
        if kind == "muon":
            return _muon(groups, lr_init)
        from rwkvtune.adapters.quant import adamw_8bit

        return adamw_8bit(groups, lr=lr_init, betas=betas, eps=max(eps, EPS_8BIT))

    parts: list[Optimizer] = []
    for make, wanted in ((adamw, False), (special, True)):
        chosen = _chosen(groups, lambda n, p, w=wanted: _is_special(kind, n, p) is w)  # type: ignore[misc]
        units = _one_by_one(chosen) if in_backward else [chosen] if chosen else []
        parts += [make(unit) for unit in units]
    optimizer = parts[0] if len(parts) == 1 and not in_backward else JoinedOptimizer(parts)
    set_hyperparameters(optimizer, lr=lr_init, weight_decay=weight_decay)
    if isinstance(optimizer, JoinedOptimizer) and in_backward:
        optimizer.step_in_backward()
    return optimizer


def _is_special(kind: Kind, name: str, parameter: Tensor) -> bool:
    """Whether adamw8bit or muon is meant for this parameter."""
    if kind == "muon":
        is_in_mix = ".att." in name or ".ffn." in name
        return is_in_mix and name.endswith(".weight") and parameter.dim() == 2
    return kind == "adamw8bit" and parameter.numel() >= LEAST_8BIT


def _chosen(
    groups: Iterable[dict[str, Any]], fits: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    """The same groups with only the parameters that fit; without those that are empty then."""
    parted = [
        group | {"params": [(n, p) for n, p in group["params"] if fits(n, p)]} for group in groups
    ]
    return [group for group in parted if group["params"]]


def _one_by_one(groups: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A list of groups for each parameter alone."""
    return [[group | {"params": [named]}] for group in groups for named in group["params"]]


def _muon(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    made = getattr(torch.optim, "Muon", None)
    if made is None:
        raise UserError(
            f"optimizer=muon needs torch 2.9 or later, this is {torch.__version__}: use adamw"
        )
    optimizer: Optimizer = made(groups, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return optimizer


def set_hyperparameters(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's rates: lr times each group's scale, weight decay on the group that decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["my_lr_scale"]
        group["weight_decay"] = weight_decay if group["name"] == "decay" else 0.0


def optimizer_state_to_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "exp_avg.<name>", "exp_avg_sq.<name>", "step.<name>" and so on; not
    copied.

    A parameter that never had a gradient (v0, v1, v2 of the first x070 block) has no keys.
    """
    parts = _parts_of(optimizer)
    return {
        f"{key}.{name}": torch.as_tensor(parts[parameter].state[parameter][key]).detach()
        for name, parameter in _optimized(optimizer, model).items()
        if parts[parameter].state.get(parameter)
        for key in _state_shapes(parts[parameter], parameter)
    }


def load_optimizer_state(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what optimizer_state_to_tensors gave, bit for bit, copied to the parameters' device.

    All of it is checked first: UserError names what is missing, unknown or of another shape, and
    then nothing has changed.
    """
    optimized, parts = _optimized(optimizer, model), _parts_of(optimizer)
    shapes = {name: _state_shapes(parts[p], p) for name, p in optimized.items()}
    known = {f"{key}.{name}": name for name in optimized for key in shapes[name]}
    problems = [f"{key} belongs to no trained parameter" for key in tensors if key not in known]
    with_state = {known[key] for key in tensors if key in known}
    for name in sorted(with_state):
        for key, wanted in shapes[name].items():
            found = tensors.get(f"{key}.{name}")
            if found is None:
                problems.append(f"{key}.{name} is missing")
            elif tuple(found.shape) != wanted:
                problems.append(f"{key}.{name} has shape {tuple(found.shape)}, needs {wanted}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise UserError(
            f"this optimizer state does not fit the model: {shown}. Resume with the settings of "
            "the run that wrote it, or start a new run from its weights with load_model."
        )
    for name, parameter in optimized.items():
        part = parts[parameter]
        part.state.pop(parameter, None)
        if name in with_state:
            saved = {key: tensors[f"{key}.{name}"] for key in shapes[name]}
            part.state[parameter] = _state_from(part, parameter, saved)


def _state_shapes(part: Optimizer, parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """What an optimizer keeps for a parameter: key -> shape."""
    shape = tuple(parameter.shape)
    if isinstance(part, AdamW):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if isinstance(part, getattr(torch.optim, "Muon", ())):
        return {"momentum_buffer": shape}
    blocks = (-(-parameter.numel() // BLOCK_8BIT),)
    return {"step": (), "state1": shape, "state2": shape, "absmax1": blocks, "absmax2": blocks}


def _state_from(part: Optimizer, parameter: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
    """The state of a parameter as the optimizer keeps it, from whole tensors on any device."""
    moments: dict[str, Any] = {
        key: _laid_out_like(tensor.to(parameter.device, copy=True), parameter)
        for key, tensor in saved.items()
        if key != "step"
    }
    if "step" not in saved:
        return moments
    if not isinstance(part, AdamW):
        from rwkvtune.adapters.quant import adamw_8bit_maps

        return moments | {"step": int(saved["step"])} | adamw_8bit_maps(parameter.device)
    (is_fused,) = {g["fused"] for g in part.param_groups for p in g["params"] if p is parameter}
    # torch keeps the count on the CPU unless the fused kernel reads it.
    step_device = parameter.device if is_fused else torch.device("cpu")
    return {"step": saved["step"].to(step_device, torch.float32, copy=True), **moments}


def _parts_of(optimizer: Optimizer) -> dict[Tensor, Optimizer]:
    """Parameter -> the torch optimizer that moves it."""
    parts = getattr(optimizer, "parts", [optimizer])
    return {p: part for part in parts for group in part.param_groups for p in group["params"]}


def _laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded over the ranks where `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def _optimized(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the model that the optimizer trains, by name."""
    ours = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {name: p for name, p in model.named_parameters() if p in ours}
