"""Generation does for x052 and x060 what it does for x070."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvtune.checkpoint import save_weights
from rwkvtune.inference.generate import generate
from rwkvtune.inference.load import load_model
from rwkvtune.models import CONFIG_CLASSES, build_model

PROMPT = [5, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(params=["x052", "x060"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with a model whose every part matters."""
    model = build_model(CONFIG_CLASSES[request.param](31, 2, 32, head_size=16), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    save_weights(tmp_path / "weights.pth", model.state_dict())
    return tmp_path / "weights.pth"


def test_greedy_generation_equals_the_full_forward_pass(weights: Path) -> None:
    model = load_model(weights)
    found = list(generate(model, PROMPT, max_tokens=20, temperature=0))
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in found:
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert found == ids[len(PROMPT) :]
    assert len(set(found)) > 3  # else the comparison would say little


def test_a_model_loaded_in_bf16_answers_nearly_as_in_fp32(weights: Path) -> None:
    model, short = load_model(weights), load_model(weights, dtype=torch.bfloat16)
    kept = {n for n, p in short.named_parameters() if p.dtype == torch.float32}
    assert any(n.endswith("time_decay") for n in kept)
    assert short.get_parameter("blocks.1.att.key.weight").dtype == torch.bfloat16
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        exact, near = model(ids)[0], short(ids)[0].float()
    # A bf16 number is off by up to 2^-9 of itself; two layers of that.
    assert (near - exact).norm() < 2e-2 * exact.norm()
