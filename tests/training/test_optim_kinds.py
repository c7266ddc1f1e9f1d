"""Optimizers besides AdamW, and steps inside the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkvtune.errors import UserError
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.training.optim import (
    JoinedOptimizer,
    Kind,
    build_optimizer,
    load_optimizer_state,
    optimizer_state_to_tensors,
)

CONFIG = RWKV7Config(vocab_size=70, n_layer=2, n_embd=64, head_size=32)
IDS = torch.arange(24).view(2, 12) % 70
KINDS: tuple[Kind, ...] = ("adamw", "adamw8bit", "muon")


def built(model: nn.Module, kind: Kind, *, in_backward: bool = False) -> Optimizer:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the dev extra")
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("muon needs torch 2.9")
    return build_optimizer(
        model.named_parameters(),
        lr_init=1e-3,
        betas=(0.9, 0.99),
        eps=1e-18,
        weight_decay=0.1,
        kind=kind,
        in_backward=in_backward,
    )


def loss_of(model: nn.Module) -> Tensor:
    logits: Tensor = model(IDS)[0]
    return nn.functional.cross_entropy(logits.flatten(0, 1), IDS.roll(-1, 1).flatten())


def step(model: nn.Module, optimizer: Optimizer) -> None:
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_moves_matrices_of_the_mixes_by_orthogonal_updates_and_all_else_as_adamw() -> None:
    model = build_model(CONFIG, seed=1)
    by_adamw = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    built(model, "muon").step()
    step(by_adamw, built(by_adamw, "adamw"))
    matrices = [n for n in before if n.startswith("blocks") and n.endswith(".weight")]
    matrices = [n for n in matrices if before[n].dim() == 2]
    assert len(matrices) == 12
    moved = 0
    for name, parameter in model.named_parameters():
        if name not in matrices:
            assert torch.equal(parameter, by_adamw.get_parameter(name)), name
            continue
        # Weight decay apart; then 0.2 sqrt(max(rows, columns)) makes the size that of AdamW.
        update = (before[name] * (1 - 1e-3 * 0.1) - parameter.detach()) / 1e-3
        values = torch.linalg.svdvals(update / (0.2 * max(update.shape) ** 0.5))
        u, s, vh = torch.linalg.svd(gradients[name], full_matrices=False)
        if s[0] < 1e-8:
            continue  # matrices behind one that starts as zero have no gradient yet
        moved += 1
        kept = s > 1e-3 * s[0]
        # Newton-Schulz leaves singular values between about 0.7 and 1.2, arXiv:2502.16982.
        assert values[: int(kept.sum())].min() > 0.5 and values.max() < 1.35
        along = torch.diag(u.T @ update @ vh.T)[kept]
        assert bool((along > 0.5 * 0.2 * max(update.shape) ** 0.5).all())
    assert moved >= 4


def test_eight_bit_moments_follow_adamw_closely_in_a_quarter_of_its_memory() -> None:
    model = build_model(CONFIG, seed=1)
    exact = copy.deepcopy(model)
    start = copy.deepcopy(model)
    optimizers = {m: built(m, kind) for m, kind in ((model, "adamw8bit"), (exact, "adamw"))}  # type: ignore[arg-type]
    for _ in range(10):
        for m, optimizer in optimizers.items():
            step(m, optimizer)
    for name in ("emb.weight", "head.weight", "blocks.1.ffn.value.weight"):
        path = exact.get_parameter(name) - start.get_parameter(name)
        error = model.get_parameter(name) - exact.get_parameter(name)
        assert error.norm() < 0.2 * path.norm(), name
    state = optimizer_state_to_tensors(optimizers[model], model)
    large = [n for n, p in model.named_parameters() if p.numel() >= 4096]
    sizes = [t.nbytes for key, t in state.items() if key.partition(".")[2] in large]
    count = sum(model.get_parameter(n).numel() for n in large)
    assert sum(sizes) < 2.1 * count  # AdamW: 8 bytes for each parameter


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_with_the_same_bits(kind: Kind) -> None:
    model = build_model(CONFIG, seed=1)
    optimizer = built(model, kind)
    for _ in range(3):
        step(model, optimizer)
    state = {k: v.clone() for k, v in optimizer_state_to_tensors(optimizer, model).items()}
    again = copy.deepcopy(model)
    its_optimizer = built(again, kind)
    load_optimizer_state(its_optimizer, again, state)
    for m, o in ((model, optimizer), (again, its_optimizer)):
        step(m, o)
        step(m, o)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    if kind != "adamw":
        with pytest.raises(UserError, match="does not fit the model"):
            load_optimizer_state(built(again, "adamw"), again, state)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_inside_the_backward_pass_move_to_the_same_place(kind: Kind) -> None:
    model = build_model(CONFIG, seed=1)
    inside = copy.deepcopy(model)
    optimizer, its_optimizer = built(model, kind), built(inside, kind, in_backward=True)
    assert isinstance(its_optimizer, JoinedOptimizer)
    for _ in range(3):
        loss_of(model).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        loss_of(inside).backward()
        assert all(p.grad is None for p in inside.parameters())
        assert its_optimizer.gradient_norm() == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, inside.get_parameter(name)), name


def test_a_gradient_that_is_not_finite_stops_the_backward_pass() -> None:
    model = build_model(CONFIG, seed=1)
    built(model, "adamw", in_backward=True)
    with pytest.raises(UserError, match=r"gradient of .* is not finite"):
        (loss_of(model) * float("inf")).backward()
