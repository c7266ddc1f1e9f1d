"""Evaluation against log-softmax over full logits, one window at a time, in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from rwkvtune.errors import UserError
from rwkvtune.evaluation.perplexity import Evaluation, evaluate
from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.rwkv7.model import RWKV7

VOCAB, CTX = 31, 8
TOKENS = np.random.default_rng(3).integers(0, VOCAB, 61)  # 60 targets: seven windows and a half


@pytest.fixture
def model() -> RWKV7:
    model = build_model(RWKV7Config(VOCAB, 2, 32, head_size=16), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    assert isinstance(model, RWKV7)
    return model


def measure(model: torch.nn.Module, **arguments: Any) -> Evaluation:
    defaults: dict[str, Any] = {
        "ctx_len": CTX,
        "batch_size": 3,
        "device": "cpu",
        "loss_head": head_cross_entropy,
    }
    return evaluate(model, TOKENS, **(defaults | arguments))


def losses_one_by_one(model: RWKV7, tokens: np.ndarray) -> np.ndarray:
    """The witness: -log softmax(logits)[target] of each target, fp64."""
    losses = []
    for start in range(0, len(tokens) - 1, CTX):
        window = torch.from_numpy(tokens[start : start + CTX + 1])
        with torch.no_grad():
            logits, _ = model(window[None, :-1])
        log_p = torch.log_softmax(logits[0].double(), dim=-1)
        losses += [-float(log_p[i, t]) for i, t in enumerate(window[1:])]
    return np.array(losses)


def test_loss_is_the_mean_over_every_target_once(model: RWKV7) -> None:
    expected = losses_one_by_one(model, TOKENS)
    found = measure(model)
    assert found.tokens == len(expected) == len(TOKENS) - 1
    assert found.loss == pytest.approx(expected.mean(), rel=1e-6)  # fp32 logits
    assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert found.bits_per_byte is None


def test_the_batch_size_changes_nothing(model: RWKV7) -> None:
    assert measure(model, batch_size=1).loss == pytest.approx(measure(model).loss, rel=1e-6)


def test_bits_per_byte_divides_by_the_bytes_of_the_targets(model: RWKV7) -> None:
    byte_lengths = np.arange(VOCAB)  # token 0 stands for no byte: its loss counts, its bytes do not
    expected = losses_one_by_one(model, TOKENS).sum() / math.log(2) / TOKENS[1:].sum()
    assert measure(model, byte_lengths=byte_lengths).bits_per_byte == pytest.approx(expected, 1e-6)


def test_max_windows_takes_the_first_windows(model: RWKV7) -> None:
    found = measure(model, max_windows=2)
    assert found.tokens == 2 * CTX
    assert found.loss == pytest.approx(losses_one_by_one(model, TOKENS[: 2 * CTX + 1]).mean(), 1e-6)


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_together_find_what_one_finds(model: RWKV7, world_size: int) -> None:
    shares: list[Tensor] = []

    def note(sums: Tensor) -> Tensor:
        shares.append(sums)
        return torch.stack(shares).sum(0)

    for rank in range(world_size):
        together = measure(model, rank=rank, world_size=world_size, sum_over_ranks=note)
    whole = measure(model)
    assert together.tokens == whole.tokens
    assert together.loss == pytest.approx(whole.loss, rel=1e-6)


def test_documents_are_told_apart_when_asked(model: RWKV7) -> None:
    tokens = np.array([7, 3, 9, 0, 4, 4, 8, 2, 6])
    # The first token after the end of a document is the first that a fresh state sees.
    parts = [np.array([7, 3, 9, 0, 4]), np.array([4, 4, 8, 2, 6])]
    expected = np.concatenate([losses_one_by_one(model, part) for part in parts]).mean()
    found = evaluate(
        model, tokens, ctx_len=CTX, batch_size=1, device="cpu",
        loss_head=head_cross_entropy, reset_at_documents=True,
    )  # fmt: skip
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_a_model_wrapped_by_fabric_gives_the_same_and_bf16_nearly_the_same(model: RWKV7) -> None:
    plain = measure(model)
    wrapped = Fabric(accelerator="cpu", devices=1).setup(model)
    assert measure(wrapped).loss == plain.loss
    with torch.autocast("cpu", torch.bfloat16):
        assert measure(model).loss == pytest.approx(plain.loss, rel=0.02)  # 8 bits of mantissa


def test_the_model_keeps_its_mode_and_can_be_trained_afterwards(model: RWKV7) -> None:
    model.train()
    inside: list[bool] = []
    model.register_forward_hook(lambda *_: inside.append(model.training or torch.is_grad_enabled()))
    measure(model)
    assert not any(inside)
    assert model.training and torch.is_grad_enabled()
    model(torch.tensor([[1, 2]]))[0].sum().backward()


def test_what_cannot_be_measured_is_refused(model: RWKV7) -> None:
    with pytest.raises(UserError, match="1 tokens are too few"):
        evaluate(
            model, TOKENS[:1], ctx_len=CTX, batch_size=1, device="cpu", loss_head=head_cross_entropy
        )
    with pytest.raises(UserError, match="the tokenizer has 0 to 9"):
        measure(model, byte_lengths=np.ones(10))
