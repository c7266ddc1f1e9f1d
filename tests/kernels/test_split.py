"""A sequence over several processes has the outputs and every gradient of one process."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rwkvtune.kernels.split import split_over
from rwkvtune.models import CONFIG_CLASSES, build_model

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["rwkvtune.models"])

B, T = 2, 24
SIZES = {"n_layer": 2, "n_embd": 32, "vocab_size": 17, "head_size": 16}
EQUAL = 1e-5


def model_of(version: str, grad_cp: bool) -> torch.nn.Module:
    sizes = SIZES | ({"mix_rank": 4} if version == "x060" else {})
    model = build_model(CONFIG_CLASSES[version](**sizes), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # initial values leave most of the model out of the loss
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.grad_cp = grad_cp
    return model.double() if version == "x070" else model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(17, (B, T), generator=generator)
    weights = torch.randn(B, T, 17, generator=generator)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 9] = reset[1, 12] = True  # inside a stretch, and where one starts
    return ids, weights, reset


def live(rank: int, size: int, folder: str, cases: list[tuple[str, bool, bool]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    ids, weights, reset = (x.chunk(size, dim=1)[rank] for x in inputs())
    for number, (version, grad_cp, with_reset) in enumerate(cases):
        model = model_of(version, grad_cp)
        with split_over(dist.group.WORLD):
            logits, _ = model(ids, reset=reset if with_reset else None)
            loss = (logits * weights).sum()
            loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save((logits.detach(), gradients), f"{folder}/{number}-{rank}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


CASES = [
    ("x070", False, False),
    ("x070", True, True),
    ("x060", False, True),
    ("x052", False, False),
]


@pytest.mark.parametrize("size", [2, 4])
def test_a_sequence_over_processes_has_the_outputs_and_gradients_of_one(
    size: int, tmp_path: Path
) -> None:
    processes = [
        SERVER.Process(target=live, args=(rank, size, str(tmp_path), CASES), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    ids, weights, reset = inputs()
    for number, (version, _, with_reset) in enumerate(CASES):
        model = model_of(version, False)
        logits, _ = model(ids, reset=reset if with_reset else None)
        (logits * weights).sum().backward()
        parts = [torch.load(tmp_path / f"{number}-{rank}") for rank in range(size)]
        torch.testing.assert_close(
            torch.cat([p[0] for p in parts], dim=1), logits.detach(), rtol=EQUAL, atol=EQUAL
        )
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(expected) == set(parts[0][1])
        for name, gradient in expected.items():
            total = sum(p[1][name] for p in parts)
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                total, gradient, rtol=0, atol=EQUAL * max(scale, 1.0), msg=f"{version} {name}"
            )
