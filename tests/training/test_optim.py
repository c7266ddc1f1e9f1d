from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rwkvtune.errors import UserError
from rwkvtune.training.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state_to_tensors,
    param_groups,
    set_hyperparameters,
)

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GROUPS = json.loads((GOLDEN / "optimizer_groups.json").read_text())
SCHEDULES = json.loads((GOLDEN / "lr_schedule.json").read_text())


def as_dict(names_and_parameters: dict[str, Tensor]) -> nn.Module:
    """A module whose parameters have exactly these (dotted) names."""
    root = nn.Module()
    for name, tensor in names_and_parameters.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor))
    return root


def small_model(seed: int = 0) -> nn.Module:
    """One parameter for each of the groups 1x, 2x and decay, and one that never gets a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "emb.weight": (7, 4),
        "blocks.0.att.w0": (4,),
        "blocks.0.att.x_r": (1, 1, 4),
        "blocks.0.att.v0": (1, 1, 4),
        "ln_out.weight": (4,),
    }
    return as_dict({n: torch.randn(s, generator=generator) for n, s in shapes.items()})


def give_gradients(model: nn.Module, step: int) -> None:
    """The same random gradients for every model at the same step; none for att.v0."""
    generator = torch.Generator().manual_seed(1000 + step)
    for name, parameter in model.named_parameters():
        if name != "blocks.0.att.v0":
            parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("version", "case"), [(v, c) for v in GROUPS for c in GROUPS[v]["optimizer"]]
)
def test_groups_equal_those_of_the_original_programs(version: str, case: str) -> None:
    golden = [g for g in GROUPS[version]["optimizer"][case]["groups"] if g["params"]]
    # On the meta device only names and shapes exist, which is all that the rules look at.
    parameters = [
        (name, nn.Parameter(torch.empty(shape, device="meta")))
        for name, shape in GROUPS[version]["shapes"].items()
    ]
    random.Random(0).shuffle(parameters)
    groups = param_groups(
        parameters,
        weight_decay=0.0 if case.endswith("nowd") else 0.001,
        layerwise_lr=not case.startswith("nolayerwise"),
        stage2=case.startswith("stage2"),
    )
    found = [([n for n, _ in g["params"]], g["my_lr_scale"], g["weight_decay"]) for g in groups]
    wanted = [(g["params"], g["my_lr_scale"], g["weight_decay"]) for g in golden]
    assert found == wanted


@pytest.mark.parametrize("case", [name for name, case in SCHEDULES.items() if "rows" in case])
def test_each_group_gets_the_rates_that_the_original_callbacks_set(case: str) -> None:
    args = SCHEDULES[case]["args"]
    optimizer = build_optimizer(
        small_model().named_parameters(),
        lr_init=args["lr_init"],
        betas=(0.9, 0.99),
        eps=1e-18,
        weight_decay=args["weight_decay"],
        layerwise_lr=bool(args["layerwise_lr"]),
    )
    for row in SCHEDULES[case]["rows"]:
        if "exit" in row:
            continue
        set_hyperparameters(optimizer, lr=row["lr"], weight_decay=row["wd"])
        rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
        golden = zip(("1x", "2x", "decay"), row["group_lr"], row["group_wd"], strict=True)
        for name, lr, weight_decay in golden:
            if name in rates:
                assert rates[name] == (lr, weight_decay)
        assert set(rates) == {"1x", "decay"} | ({"2x"} if args["layerwise_lr"] else set())


def adam_in_fp64(
    start: Tensor, gradients: list[Tensor], *, lr: float, weight_decay: float, eps: float
) -> Tensor:
    """Adam with bias correction, eps outside the root and decoupled decay, as the formula says."""
    value = start.double()
    mean = torch.zeros_like(value)
    square = torch.zeros_like(value)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        mean = 0.9 * mean + 0.1 * g
        square = 0.99 * square + 0.01 * g * g
        step = (mean / (1 - 0.9**t)) / ((square / (1 - 0.99**t)).sqrt() + eps)
        value = value - lr * weight_decay * value - lr * step
    return value


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("exponent", [2, 0, -8, -16, -18, -20, -30])
def test_training_follows_adam_in_fp64_for_gradients_of_any_size(
    fused: bool, weight_decay: float, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(exponent + 100)
    start = torch.randn(16, 8, generator=generator)
    gradients = [10.0**exponent * torch.randn(16, 8, generator=generator) for _ in range(50)]
    for gradient in gradients:
        gradient[3] = 0.0  # a row that is never used
    gradients[20:30] = [torch.zeros_like(start)] * 10
    model = as_dict({"head.weight": start.clone()})
    parameter = next(model.parameters())
    optimizer = build_optimizer(
        model.named_parameters(),
        lr_init=1e-3,
        betas=(0.9, 0.99),
        eps=1e-18,
        weight_decay=weight_decay,
        fused=fused,
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    reference = adam_in_fp64(start, gradients, lr=1e-3, weight_decay=weight_decay, eps=1e-18)
    # 50 roundings of values below 4, each half of 2**-22; below 1e-19 the squares are subnormal
    # in fp32, where the step is at most one per cent off.
    tolerance = 50 * 2**-23 + (50 * 1e-5 if exponent <= -19 else 0)
    assert (parameter.detach().double() - reference).abs().max() < tolerance
    moved = (reference - start).abs().max()
    assert moved > 1e-3 or exponent < -18 or weight_decay > 0
    if weight_decay == 0:
        assert torch.equal(parameter[3].detach(), start[3])


def test_auto_is_the_fused_kernel_and_weight_decay_zero_makes_matrices_ordinary() -> None:
    optimizer = build_optimizer(
        small_model().named_parameters(), lr_init=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0
    )
    assert [g["name"] for g in optimizer.param_groups] == ["1x", "2x"]
    assert all(g["fused"] for g in optimizer.param_groups)


def make_run(*, fused: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_model()
    optimizer = build_optimizer(
        model.named_parameters(),
        lr_init=1e-2,
        betas=(0.9, 0.99),
        eps=1e-18,
        weight_decay=0.1,
        fused=fused,
    )
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        set_hyperparameters(optimizer, lr=1e-2 / (1 + step), weight_decay=0.1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_continues_with_the_same_bits_from_state_kept_by_name(fused: bool) -> None:
    unbroken, optimizer = make_run(fused=fused)
    train(unbroken, optimizer, range(10))

    first, optimizer = make_run(fused=fused)
    train(first, optimizer, range(6))
    state = {k: v.clone() for k, v in optimizer_state_to_tensors(optimizer, first).items()}
    assert state["step.emb.weight"] == 6 and state["exp_avg_sq.emb.weight"].shape == (7, 4)
    assert not any("att.v0" in key for key in state)
    kept = {k: v.clone() for k, v in state.items()}

    # Other initial values and other leftovers, to see that all of them are replaced.
    second = small_model(seed=9)
    optimizer = build_optimizer(
        second.named_parameters(),
        lr_init=1.0,
        betas=(0.9, 0.99),
        eps=1e-18,
        weight_decay=0.1,
        fused=fused,
    )
    train(second, optimizer, range(2))
    second.get_parameter("blocks.0.att.v0").grad = torch.ones(1, 1, 4)
    optimizer.step()
    optimizer.zero_grad()
    second.load_state_dict(first.state_dict())
    load_optimizer_state(optimizer, second, state)
    assert optimizer_state_to_tensors(optimizer, second).keys() == state.keys()
    train(second, optimizer, range(6, 10))

    for (name, wanted), found in zip(unbroken.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(wanted, found), name
    assert all(torch.equal(state[k], kept[k]) for k in kept), "the loaded tensors were changed"


def test_a_parameter_without_gradient_is_neither_moved_nor_decayed() -> None:
    model = as_dict({"head.weight": torch.randn(4, 4), "emb.weight": torch.randn(4, 4)})
    before = model.get_parameter("head.weight").detach().clone()
    optimizer = build_optimizer(
        model.named_parameters(), lr_init=0.1, betas=(0.9, 0.99), eps=1e-18, weight_decay=0.5
    )
    model.get_parameter("emb.weight").grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(model.get_parameter("head.weight"), before)
    assert list(optimizer_state_to_tensors(optimizer, model)) == [
        "step.emb.weight",
        "exp_avg.emb.weight",
        "exp_avg_sq.emb.weight",
    ]


def test_frozen_parameters_are_left_out_and_a_frozen_model_is_refused() -> None:
    model = small_model()
    model.get_parameter("emb.weight").requires_grad_(False)
    names = [
        n for g in param_groups(model.named_parameters(), weight_decay=0.1) for n, _ in g["params"]
    ]
    assert "emb.weight" not in names and len(names) == 4
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter is trainable"):
        build_optimizer(
            model.named_parameters(), lr_init=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
        )


def test_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model, optimizer = make_run(fused=True)
    train(model, optimizer, range(3))
    state = {k: v.clone() for k, v in optimizer_state_to_tensors(optimizer, model).items()}
    wrong = {k: v for k, v in state.items() if k != "exp_avg.ln_out.weight"}
    wrong["exp_avg.emb.weight"] = torch.zeros(8, 4)
    wrong["step.blocks.1.att.w0"] = torch.tensor(3.0)
    with pytest.raises(UserError) as caught:
        load_optimizer_state(optimizer, model, wrong)
    assert "exp_avg.ln_out.weight is missing" in str(caught.value)
    assert "exp_avg.emb.weight has shape (8, 4), needs (7, 4)" in str(caught.value)
    assert "step.blocks.1.att.w0 belongs to no trained parameter" in str(caught.value)
    now = optimizer_state_to_tensors(optimizer, model)
    assert now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state)
