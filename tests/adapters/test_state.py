"""Tuned initial states against the `rwkv` package and against states that are passed on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkvtune.adapters import state as tuned
from rwkvtune.adapters.adapter import attach, merge
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.checkpoint import save_weights
from rwkvtune.errors import UserError
from rwkvtune.models.frame import LanguageModel
from tests.adapters.bases import CONFIGS, IDS, make_base, shake

# Its class for x070 takes the file's tensors as the state; that for the others finds them among the
# weights. Both see the same file names in the same orientation.
READER = """
import sys
import torch
from rwkv.model import RWKV

folder, is_x070, *ids = sys.argv[1:]
ids = [int(id) for id in ids]
state = None
model = RWKV(model=folder + "/model", strategy="cpu fp32")
if is_x070 == "1":
    state = model.generate_zero_state()
    for name, tensor in torch.load(folder + "/adapter/state.pth").items():
        state[3 * int(name.split(".")[1]) + 1] = tensor
logits, _ = model.forward(ids, state, full_output=True)
torch.save(logits, folder + "/logits")
"""


def tuned_model(version: str) -> LanguageModel:
    model = make_base(version)
    tuned.attach(model)
    shake(model, 5, 0.5)
    return model


@pytest.mark.parametrize("version", CONFIGS)
def test_the_rwkv_package_answers_from_our_state_file_as_our_model_does(
    tmp_path: Path, version: str
) -> None:
    pytest.importorskip("rwkv", reason="the rwkv package comes with the dev extra")
    model = make_base(version)
    save_weights(tmp_path / "model.pth", model.state_dict())
    adapter = attach(model, AdapterSettings("state"), str(tmp_path / "model.pth"))
    shake(model, 5, 0.5)
    adapter.save(model, {n: model.state_dict()[n] for n in adapter.tensors}, tmp_path / "adapter")
    if version != "x070":
        whole = merge(make_base(version), "model.pth", tmp_path / "adapter")
        save_weights(tmp_path / "model.pth", whole.state_dict())
    is_x070 = str(int(version == "x070"))
    settings = {"RWKV_V7_ON": is_x070, "RWKV_JIT_ON": is_x070, "RWKV_CUDA_ON": "0"}
    ids = [str(id) for id in IDS[0].tolist()]
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path), is_x070, *ids],
        env=os.environ | settings | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs: Tensor = torch.load(tmp_path / "logits")
    ours, untuned = model(IDS)[0][0], make_base(version)(IDS)[0][0]
    # As in tests/models/test_rwkv_package.py.
    assert (ours - theirs).abs().max() < 5e-5
    assert (untuned - theirs).abs().max() > 0.05


@pytest.mark.parametrize("version", CONFIGS)
def test_only_the_states_are_trained_and_their_gradient_is_the_slope_of_the_loss(
    version: str,
) -> None:
    model = tuned_model(version).double()
    ids = IDS.repeat(2, 1)

    def loss() -> Tensor:
        logits: Tensor = model(ids)[0]
        return logits.square().mean()

    loss().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(
        tuned.names_of(model)
    )
    parameter = model.get_parameter("blocks.1.att.time_state")
    assert parameter.grad is not None
    place, h = (1, 3, 7), 1e-5
    with torch.no_grad():
        parameter[place] += h
        above = loss()
        parameter[place] -= 2 * h
        slope = (above - loss()) / (2 * h)
    assert abs(float(slope - parameter.grad[place])) < 1e-6 * max(1.0, abs(float(slope)))


def test_what_follows_goes_on_from_the_state_that_is_passed_on() -> None:
    model = tuned_model("x070")
    whole, last = model(IDS)
    first, state = model(IDS[:, :4])
    second, end = model(IDS[:, 4:], state)
    assert (torch.cat([first, second], dim=1) - whole).abs().max() < 1e-5
    assert (end[1].wkv - last[1].wkv).abs().max() < 1e-5


def test_documents_inside_a_row_are_refused() -> None:
    model = tuned_model("x070")
    reset = torch.zeros(IDS.shape, dtype=torch.bool)
    with pytest.raises(UserError, match="give each document a row of its own"):
        model(IDS, reset=reset)


def test_states_of_another_model_are_refused(tmp_path: Path) -> None:
    good = {n: p.detach() for n, p in tuned_model("x070").named_parameters() if p.requires_grad}
    model = make_base("x070")
    with pytest.raises(UserError, match=r"blocks\.1\.att\.time_state is missing"):
        tuned.take(model, {"blocks.0.att.time_state": good["blocks.0.att.time_state"]}, "s.pth")
    with pytest.raises(UserError, match=r"has shape \[2, 32, 31\], needs \[2, 32, 32\]"):
        tuned.take(model, good | {"blocks.1.att.time_state": torch.zeros(2, 32, 31)}, "s.pth")
    save_weights(tmp_path / "s.pth", good)
    tuned.take(model, tuned.load(tmp_path / "s.pth"), "s.pth")
    assert torch.equal(model(IDS)[0], tuned_model("x070")(IDS)[0])
