"""The `rwkv` package, a program of its own, reads our files and answers as our model does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rwkvtune
from rwkvtune.checkpoint import save_weights
from rwkvtune.models import ModelConfig, RWKV5Config, RWKV6Config, RWKV7Config, build_model

pytest.importorskip("rwkv", reason="the rwkv package comes with the dev extra")

# The package reads its settings from the environment when it is imported and switches torch's
# scripting for the whole process, so it runs in one of its own. Logits of all tokens at once, and
# one token at a time with the state passed on.
READER = """
import sys
import torch
from rwkv.model import RWKV

ids = torch.load(sys.argv[1])
for path in sys.argv[2:]:
    model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
    whole, _ = model.forward(list(ids), None, full_output=True)
    state, rows = None, []
    for token in ids:
        row, state = model.forward([token], state)
        rows.append(row)
    torch.save({"whole": whole, "stepped": torch.stack(rows), "state": state}, path + ".out")
"""

CONFIGS: dict[str, ModelConfig] = {
    "fp32": RWKV7Config(vocab_size=300, n_layer=3, n_embd=128),
    "bf16": RWKV7Config(vocab_size=300, n_layer=3, n_embd=128),
    "one-layer": RWKV7Config(vocab_size=31, n_layer=1, n_embd=64),
    "head-size-32": RWKV7Config(vocab_size=31, n_layer=2, n_embd=96, head_size=32, g_rank=7),
}
OLDER: dict[str, ModelConfig] = {
    "x052": RWKV5Config(vocab_size=300, n_layer=3, n_embd=128),
    # Not one layer alone: the package finds the number of heads of x052 from the second on.
    "x052-head-size-32": RWKV5Config(31, 2, 96, head_size=32, dim_ffn=100),
    "x060": RWKV6Config(vocab_size=300, n_layer=3, n_embd=128),
    "x060-wide": RWKV6Config(31, 2, 64, mix_rank=64, decay_rank=128),
}
IDS = [3, 17, 0, 30, 5, 5, 5, 22, 9, 1, 28]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a .pth of ours for each configuration and the package's answer beside it."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(IDS, folder / "ids")
    for name, config in (CONFIGS | OLDER).items():
        model = build_model(config, seed=1)
        generator = torch.Generator().manual_seed(2)
        weights = {
            n: w + 0.05 * torch.randn(w.shape, generator=generator)
            for n, w in model.state_dict().items()
        }
        dtype = "bf16" if name == "bf16" else None
        save_weights(folder / f"{name}.pth", weights, dtype=dtype)
    # The package has two classes of the same name, one for x070 and one for all versions before it.
    for is_x070, configs in (("1", CONFIGS), ("0", OLDER)):
        settings = {"RWKV_V7_ON": is_x070, "RWKV_JIT_ON": is_x070, "RWKV_CUDA_ON": "0"}
        paths = [str(folder / f"{name}.pth") for name in configs]
        done = subprocess.run(
            [sys.executable, "-c", READER, str(folder / "ids"), *paths],
            env=os.environ | settings | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CONFIGS | OLDER)
def test_the_rwkv_package_gives_the_logits_and_states_of_our_model(
    answers: Path, name: str
) -> None:
    model = rwkvtune.load(answers / f"{name}.pth")
    with torch.no_grad():
        logits, state = model(torch.tensor([IDS]))
    theirs: dict[str, Tensor | list[Tensor]] = torch.load(answers / f"{name}.pth.out")
    # The package rounds exp(-0.5) to 0.606531 and sums in another order: 4e-6 apart as measured.
    for form in ("whole", "stepped"):
        found = theirs[form]
        assert isinstance(found, Tensor) and found.shape == logits[0].shape
        assert (found - logits[0]).abs().max() < 2e-5
    assert logits.std() > 0.5
    for i, (att_shift, wkv, ffn_shift) in enumerate(state):
        # In its class for the older versions, a state has a row for each key channel.
        ours = att_shift, wkv if name in CONFIGS else wkv.mT, ffn_shift
        for mine, its in zip(ours, theirs["state"][3 * i : 3 * i + 3], strict=True):
            assert (mine[0] - its).abs().max() < 2e-5
