"""Runs that train an adapter: exact resume, truncated gradients, what is on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkvtune.adapters.adapter import attach, sizes
from rwkvtune.adapters.quant import bytes_of
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.data.batch import Batch
from rwkvtune.errors import UserError
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.training.config import OptimizerOptions, TrainConfig
from rwkvtune.training.lm import next_token_loss, train_language_model
from tests.training.runs import Blow, digest, flags, losses, outcome, run

pytest.importorskip("peft", reason="peft comes with the dev extra")
pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the dev extra")

SETTINGS: dict[str, object] = {
    "ctx_len": 32, "threads": 1, "epoch_steps": 4, "epoch_count": 2, "save_every": 3,
    "micro_bsz": 2, "order": "shuffled", "log_every": 1, "warmup_steps": 2, "val_windows": 3,
    "accelerator": "cpu", "lr_init": 3e-3,
}  # fmt: skip
CONFIG = RWKV7Config(vocab_size=256, n_layer=2, n_embd=64, head_size=32)

CASES: dict[str, dict[str, object]] = {
    "dora, nf4, norms, dropout, chunks, bf16": {
        "peft": "dora", "quant": "nf4", "train_modules": "ln_x", "chunk_len": 8, "lora_r": 4,
        "peft_config": '{"lora_dropout": 0.1}',
    },
    "pissa, muon, fp32": {
        "peft": "pissa", "optimizer": "muon", "precision": "fp32", "lora_r": 4,
        "accumulate_grad_batches": 2,
    },
    "state, adamw8bit": {"peft": "state", "optimizer": "adamw8bit"},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    weights = build_model(CONFIG, seed=1).state_dict()
    generator = torch.Generator().manual_seed(2)
    noise = {n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in weights.items()}
    save_weights(path, {n: t + noise[n] for n, t in weights.items()})
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(text: Path, base: Path, folder: Path, **changes: Any) -> int:
    values = SETTINGS | {"data_file": str(text), "load_model": str(base), "proj_dir": str(folder)}
    return train_language_model(TrainConfig.from_flat(values | changes)).exit_code


def all_of(folder: Path) -> dict[str, object]:
    adapters = {str(p.relative_to(folder)): digest(p) for p in folder.glob("adapter-*/*")}
    assert len(adapters) >= 6
    return outcome(folder) | {"adapters": adapters}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_an_adapter_run_ends_with_the_same_bits(
    case: str, text: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if CASES[case].get("optimizer") == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("muon needs torch 2.9")
    values = SETTINGS | CASES[case] | {"data_file": text, "load_model": base}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = ["train", *flags(values), "--proj_dir", str(killed)]
    ended = run(args, tmp_path / "out", Blow(1, "adapter-0"))
    assert ended.code == -9, ended.output
    # In this process, where peft is imported already.
    assert train(text, base, killed, **CASES[case]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert train(text, base, whole, **CASES[case]) == 0
    assert all_of(killed) == all_of(whole)
    assert not list(whole.glob("rwkv-*.pth"))  # the base is referred to, not copied
    state = load_weights(max(whole.glob("resume/step-*")) / "state.safetensors", verify=False)
    assert sum(t.numel() for t in state.values()) < CONFIG.num_parameters


def test_a_base_that_has_changed_since_is_refused_at_resume(
    text: Path, base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "base.pth"
    weights = load_weights(base)
    save_weights(copy, weights)
    assert train(text, copy, tmp_path / "run", peft="lora") == 0
    copy.unlink()
    save_weights(copy, weights | {"ln_out.weight": weights["ln_out.weight"] + 1e-3})
    with pytest.raises(UserError, match="same shapes but other values"):
        train(text, copy, tmp_path / "run", peft="lora", epoch_count=3)
    with pytest.raises(UserError, match=r"peft=lora.*peft=none"):
        train(text, base, tmp_path / "run", epoch_count=3)


def test_chunks_as_long_as_the_row_are_the_full_pass(
    text: Path, base: Path, tmp_path: Path
) -> None:
    for name, chunk_len in (("full", 0), ("one chunk", 32), ("longer", 100)):
        train(text, base, tmp_path / name, peft="lora", precision="fp32", chunk_len=chunk_len)
    assert losses(tmp_path / "one chunk") == losses(tmp_path / "full")
    assert losses(tmp_path / "longer") == losses(tmp_path / "full")
    train(text, base, tmp_path / "cut", peft="lora", precision="fp32", chunk_len=8)
    cut, full = losses(tmp_path / "cut"), losses(tmp_path / "full")
    assert cut[0] == pytest.approx(full[0], abs=1e-6)  # the state is passed on
    assert cut[-1] != full[-1]  # the gradient is not


def test_pieces_count_by_their_labelled_tokens_and_gradients_end_between_them() -> None:
    model = build_model(CONFIG, seed=1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype))
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(24) % 5 < 3, -100)
    targets[:, :8] = -100
    loss = partial(next_token_loss, options=OptimizerOptions(l2wrap=0.0))

    def total(carries: list[Any]) -> tuple[Tensor, int, list[Any]]:
        """The loss with the states between the pieces given, or as they come where None."""
        found, count, came, carry = torch.zeros((), dtype=torch.float64), 0, [], None
        for i, part in enumerate(Batch(ids, targets).chunks(8)):
            part_loss, tokens, carry, _ = loss(model, part, carries[i] or carry)
            found, count = found + part_loss, count + tokens
            came.append(carry)
        return found, count, came

    whole, tokens, _, _ = loss(model, Batch(ids, targets), None)
    pieces, count, came = total([None] * 3)
    assert count == tokens == int((targets != -100).sum())
    assert float(pieces) == pytest.approx(float(whole), rel=1e-6)
    # The slope of the loss while the states that are passed on stay as they are.
    model.zero_grad()
    pieces.backward()
    parameter = model.get_parameter("blocks.1.att.key.weight")
    assert parameter.grad is not None
    slope, h, fixed = parameter.grad[3, 5].item(), 1e-4, [None, came[0], came[1]]
    with torch.no_grad():
        parameter[3, 5] += h
        above = float(total(fixed)[0])
        parameter[3, 5] -= 2 * h
        below = float(total(fixed)[0])
    # The loss itself is an fp32 number.
    assert (above - below) / (2 * h) == pytest.approx(slope, abs=3e-2)


def test_memory_for_gradients_is_that_of_one_piece_however_many_there_are() -> None:
    model = build_model(CONFIG, seed=1)
    attach(model, AdapterSettings("lora", r=4), "base.pth")
    alive = peak = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal alive, peak
        alive += tensor.nbytes
        peak = max(peak, alive)
        return tensor

    peaks = []
    for num_chunks in (1, 64):
        alive = peak = 0
        ids = torch.zeros(1, 16 * num_chunks, dtype=torch.long)
        carry: Any = None
        for part in Batch(ids, ids.clone()).chunks(16):
            alive = 0  # the backward pass of the piece before has let go of everything
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss, _, carry, _ = next_token_loss(model, part, carry, OptimizerOptions())
            loss.backward()
            assert not any(t.requires_grad for layer in carry for t in layer)
        peaks.append(peak)
    # From the second piece on, the state that it goes on from is kept too.
    assert peaks[1] < 1.1 * peaks[0]


def test_steps_inside_the_backward_pass_train_the_same_model(
    text: Path, base: Path, tmp_path: Path
) -> None:
    for name, is_fused in (("plain", False), ("inside", True)):
        values = {"precision": "fp32", "grad_clip": 0.0, "fused_backward": is_fused}
        train(text, base, tmp_path / name, **values)
    assert losses(tmp_path / "inside") == losses(tmp_path / "plain")
    plain, inside = (load_weights(tmp_path / n / "rwkv-final.pth") for n in ("plain", "inside"))
    assert all(torch.equal(inside[name], plain[name]) for name in plain)
    with pytest.raises(UserError, match="grad_clip=1 needs the norm of all gradients"):
        train(text, base, tmp_path / "refused", fused_backward=True)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "miss", "state", "pissa"])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_sizes_foretell_what_an_adapter_takes(kind: str, quant: str) -> None:
    if kind == "pissa" and quant != "none":
        return
    settings = AdapterSettings(
        kind, quant=quant, train_modules="" if kind == "state" else "ln1,head"
    )
    told = sizes(CONFIG, settings, torch.bfloat16)
    model = build_model(CONFIG, seed=1)
    adapter = attach(model, settings, "base.pth", compute_dtype=torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert told.trained == sum(p.numel() for p in trained)
    initial = sum(t.nbytes for n, t in model.state_dict().items() if "initial_" in n)
    frozen = bytes_of(model) - 4 * told.trained - initial
    # Scales of int8 rows are not counted.
    assert told.frozen_bytes == pytest.approx(frozen, rel=0.02)
    assert set(adapter.tensors) >= {n for n, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_folder_says_what_it_is(text: Path, base: Path, tmp_path: Path) -> None:
    train(text, base, tmp_path / "run", peft="state")
    about = json.loads((tmp_path / "run" / "adapter-final" / "rwkvtune.json").read_text())
    assert about["orientation"] == "head, value, key"
    assert about["base"]["path"] == str(base) and about["base"]["version"] == "x070"
    states = torch.load(tmp_path / "run" / "adapter-final" / "state.pth")
    assert {tuple(t.shape) for t in states.values()} == {(2, 32, 32)}
    assert list(states) == ["blocks.0.att.time_state", "blocks.1.att.time_state"]
