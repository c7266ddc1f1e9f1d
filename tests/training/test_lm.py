"""A training step means the same however its windows are divided, and goes over the published data
in the published order."""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvtune.checkpoint import load_weights
from rwkvtune.data.batch import IGNORED_TARGET, Batch
from rwkvtune.data.binidx import BinIdx, BinIdxWriter
from rwkvtune.data.lm_dataset import LMDataset
from rwkvtune.data.sampler import PublishedOrder
from rwkvtune.errors import UserError
from rwkvtune.models import build_model, config_from_state_dict
from rwkvtune.training.config import TrainConfig
from rwkvtune.training.lm import RunResult, train_language_model
from rwkvtune.training.plan import make_plan
from tests.training.runs import epoch_lines, losses, metrics

SETTINGS = {
    "n_layer": 2, "n_embd": 64, "ctx_len": 32, "threads": 1, "precision": "fp32",
    "accelerator": "cpu", "log_every": 1, "epoch_save": 0, "warmup_steps": 3,
}  # fmt: skip


def train(text: Path, folder: Path, **changes: object) -> RunResult:
    values = SETTINGS | {"data_file": str(text), "proj_dir": str(folder)} | changes
    return train_language_model(TrainConfig.from_flat(values))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Runs set torch's thread count; the tests after these find theirs again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_accumulated_micro_batches_are_one_batch(text: Path, tmp_path: Path) -> None:
    length = {"exit_tokens": 12 * 8 * 32}
    for name, micro_bsz, accumulate in (("whole", 8, 1), ("parts", 2, 4), ("single", 1, 8)):
        sizes = {"micro_bsz": micro_bsz, "accumulate_grad_batches": accumulate}
        train(text, tmp_path / name, **length, **sizes)
    for name in ("parts", "single"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
        rows = [(row["step"], row["tokens"], row["lr"]) for row in metrics(tmp_path / name)]
        assert rows == [(r["step"], r["tokens"], r["lr"]) for r in metrics(tmp_path / "whole")]
        norms = [float(row["grad_norm"]) for row in metrics(tmp_path / name)]
        assert norms == pytest.approx(
            [float(row["grad_norm"]) for row in metrics(tmp_path / "whole")], rel=1e-4
        )
    assert len(losses(tmp_path / "whole")) == 12


def test_ignored_targets_count_for_nothing_wherever_they_lie(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of 32 to 1 targets weigh by their targets, as if they were one batch."""
    published = LMDataset.batch

    def with_holes(self: LMDataset, first: int, count: int, **ranks: int) -> Batch:
        whole = published(self, first, count, **ranks)
        targets = whole.targets.clone()
        for row in range(count):
            targets[row, 32 >> ((first + row) % 6) :] = IGNORED_TARGET
        return Batch(whole.input_ids, targets, whole.reset)

    monkeypatch.setattr(LMDataset, "batch", with_holes)
    length = {"exit_tokens": 10 * 8 * 32, "l2wrap": 0.0}
    train(text, tmp_path / "whole", **length, micro_bsz=8)
    train(text, tmp_path / "parts", **length, micro_bsz=1, accumulate_grad_batches=8)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=2e-6)

    # The first loss by hand: the mean over all targets that count, at the initial weights.
    weights = load_weights(tmp_path / "whole" / "rwkv-init.pth")
    model = build_model(config_from_state_dict(weights))
    model.load_state_dict(weights)
    data = BinIdx(text)
    order = LMDataset(data.tokens, PublishedOrder(len(data), 32), 32)
    batch = with_holes(order, 0, 8)
    with torch.no_grad():
        logits, _ = model(batch.input_ids)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), batch.targets.flatten()
    )
    assert losses(tmp_path / "whole")[0] == pytest.approx(float(expected), abs=2e-6)


def test_a_run_reads_the_published_samples_in_the_published_order(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sampler.json: the places that RWKV-LM's dataset gave, here for one process. The token at
    place p is p, so that inputs tell where their window began."""
    fixture = json.loads((golden / "sampler.json").read_text())
    num_tokens, batch_size = fixture["data_len"], fixture["micro_bsz"]
    with BinIdxWriter(tmp_path / "places", num_tokens) as writer:
        writer.add_document(np.arange(num_tokens))
    seen: list[int] = []
    published = LMDataset.batch

    def noted(self: LMDataset, first: int, count: int, **ranks: int) -> Batch:
        batch = published(self, first, count, **ranks)
        seen.extend(batch.input_ids[:, 0].tolist())
        assert torch.equal(batch.targets, batch.input_ids + 1)
        return batch

    monkeypatch.setattr(LMDataset, "batch", noted)
    settings = {
        "n_layer": 1, "n_embd": 32, "head_size": 32, "vocab_size": num_tokens,
        "micro_bsz": batch_size // 2, "accumulate_grad_batches": 2,
        "epoch_steps": fixture["samples_per_miniepoch"] // batch_size,
    }  # fmt: skip
    for case in (c for c in fixture["cases"] if c["world_size"] == 1):
        folder = tmp_path / f"run-{case['epoch']}"
        behind = case["epoch"] * settings["epoch_steps"]
        if behind:  # as upstream goes on: from the weights of the epoch before
            folder.mkdir()
            shutil.copy(
                tmp_path / "run-0" / "rwkv-final.pth", folder / f"rwkv-{case['epoch'] - 1}.pth"
            )
        seen.clear()
        steps = -(-len(case["offsets"]) // batch_size)
        length = {"exit_tokens": (behind + steps) * batch_size * 32}
        train(tmp_path / "places", folder, **settings, **length)
        assert seen[: len(case["offsets"])] == case["offsets"], case["epoch"]


def test_epochs_of_40320_samples_give_the_published_files_and_log(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = {
        "n_layer": 1, "n_embd": 32, "head_size": 32, "ctx_len": 1, "micro_bsz": 420,
        "epoch_steps": 40320 // 420, "epoch_count": 3, "epoch_save": 2, "warmup_steps": 10,
    }  # fmt: skip
    train(text, folder, **settings)
    names = {path.name for path in folder.glob("rwkv-*.pth")}
    assert names == {"rwkv-init.pth", "rwkv-0.pth", "rwkv-2.pth", "rwkv-final.pth"}
    lines = (folder / "train_log.txt").read_text().splitlines()
    assert re.fullmatch(r"NEW RUN \d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", lines[0])
    assert ast.literal_eval(lines[1])["micro_bsz"] == 420
    pattern = r"(\d) (\d\.\d{6}) (\d+\.\d{4}) (0\.\d{8}) \d{4}(-\d\d){2} [\d:]{8}\.\d+ (\d)"
    for epoch, line in enumerate(lines[2:]):
        found = re.fullmatch(pattern, line)
        assert found, line
        rows = losses(folder)[epoch * 96 : (epoch + 1) * 96]
        mean = sum(rows) / 96
        last_step = (epoch + 1) * 96 - 1
        q = (last_step - 10) / (3 * 96 - 10)
        lr = (6e-4 + 6e-5) / 2 + (6e-4 - 6e-5) / 2 * math.cos(math.pi * q)
        assert found[1] == found[6] == str(epoch)
        assert float(found[2]) == pytest.approx(mean, abs=6e-7)
        assert float(found[3]) == pytest.approx(math.exp(mean), abs=6e-5)
        assert found[4] == f"{lr:.8f}"
    assert len(lines) == 5 and len(epoch_lines(folder)) == 3


def test_exit_tokens_count_all_micro_batches(text: Path, tmp_path: Path) -> None:
    sizes = {"micro_bsz": 2, "accumulate_grad_batches": 3}
    result = train(text, tmp_path / "run", **sizes, exit_tokens=5 * 6 * 32)
    assert (result.steps, result.tokens) == (5, 960)
    result = train(text, tmp_path / "more", **sizes, exit_tokens=5 * 6 * 32 + 1)
    assert (result.steps, result.tokens) == (6, 1152), "the last step reaches the number"
    assert [int(row["tokens"]) for row in metrics(tmp_path / "more")][-2:] == [960, 1152]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(
    text: Path, tmp_path: Path
) -> None:
    """With this learning rate some step's weights overflow; the state before it is good."""
    folder = tmp_path / "run"
    bad = {"lr_init": 1e30, "lr_final": 1e30, "warmup_steps": 0, "save_every": 1, "keep_last": 9}
    with pytest.raises(UserError, match=r"step \d+: the loss is .* was not moved"):
        train(text, folder, micro_bsz=2, exit_tokens=640, **bad)
    newest = max(folder.glob("resume/step-*"))
    assert int(newest.name[5:]) == len(losses(folder)) < 10
    assert all(math.isfinite(loss) for loss in losses(folder))
    for tensor in load_weights(newest / "state.safetensors").values():
        assert not tensor.is_floating_point() or tensor.isfinite().all()


def test_a_tensor_that_no_rank_can_hold_is_a_line_about_memory(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*unused: object, **also_unused: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.\nMore lines.")

    monkeypatch.setattr("rwkvtune.training.run.fit", full)
    with pytest.raises(UserError, match=r"Tried to allocate 20.00 GiB\. A smaller --micro_bsz"):
        train(text, tmp_path / "run", micro_bsz=2, exit_tokens=640)


def test_samples_of_a_padded_vocabulary_leave_out_what_the_tokenizer_lacks(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most ids of an untrained model of 5,000 rows are beyond the text's 59 characters."""
    more = {"vocab_size": 5000, "sample_every": 1, "sample_tokens": 40, "sample_prompt": "First"}
    train(text, tmp_path / "run", micro_bsz=1, exit_tokens=64, **more)
    assert capsys.readouterr().out.count("sample at step") == 2


def test_settings_without_effect_are_told(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    for end in ("bin", "idx"):
        shutil.copy(f"{text}.{end}", f"{bare}.{end}")
    more = {
        "vocab_size": 100,
        "sample_every": 1,
        "val_every": 1,
        "strategy": "fsdp",
        "micro_bsz": 1,
        "interpolate": True,
        "lr_schedule": "constant",
        "lr_final": 1e-5,
        "decay_share": 0.5,
        "hold_epochs": 1,
    }
    train(bare, tmp_path / "run", exit_tokens=64, **more, precision="tf32")
    told = capsys.readouterr().out
    assert "no samples: the data has no tokenizer" in told
    assert "val_every=1 does nothing without val_data_file" in told
    assert "interpolate=True does nothing without load_model" in told
    assert "lr_final=1e-05 does nothing with lr_schedule=constant" in told
    assert "decay_share=0.5 does nothing without lr_schedule=wsd" in told
    assert "hold_epochs=1 does nothing with lr_schedule=constant" in told
    assert "strategy fsdp: one device has nothing to shard" in told
    assert "precision tf32: a cpu device has no tf32" in told


def test_sample_settings_without_samples_are_told() -> None:
    config = TrainConfig.from_flat({"sample_prompt": "Once", "layerwise_lr": False})
    assert config.without_effect() == ["sample_prompt='Once' does nothing without sample_every"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu_runs_on_the_cpu_and_says_so(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = {"micro_bsz": 1, "exit_tokens": 64}
    train(text, tmp_path / "gpu", accelerator="gpu", strategy="deepspeed_stage_2", **length)
    told = capsys.readouterr().out
    assert "accelerator gpu: torch" in told and "this runs on the CPU" in told
    assert "deepspeed_stage_2: one device has nothing to shard" in told
    train(text, tmp_path / "cpu", **length)
    assert losses(tmp_path / "gpu") == losses(tmp_path / "cpu")


def test_init_only_writes_the_weights_that_a_run_of_the_same_seed_starts_from(
    text: Path, tmp_path: Path
) -> None:
    train(text, tmp_path / "init", init_only=True)
    assert sorted(p.name for p in (tmp_path / "init").iterdir() if p.name[0] != ".") == [
        "rwkv-init.pth",
        "tokenizer.json",
    ]
    train(text, tmp_path / "run", micro_bsz=1, exit_tokens=64)
    alone, of_run = (load_weights(tmp_path / f / "rwkv-init.pth") for f in ("init", "run"))
    assert alone.keys() == of_run.keys()
    assert all(torch.equal(alone[name], of_run[name]) for name in alone)
    # Other settings than stage 1's may follow, and the run starts from the file.
    train(text, tmp_path / "init", micro_bsz=1, exit_tokens=64, resume="required", lr_init=0)
    final = load_weights(tmp_path / "init" / "rwkv-final.pth")
    assert all(torch.equal(alone[name], final[name]) for name in alone)
    with pytest.raises(UserError, match="a run that has begun"):
        train(text, tmp_path / "init", init_only=True)


@pytest.mark.parametrize(
    ("settings", "num_slots", "expected"),
    [
        # RWKV-LM: epoch_steps = 40320 / batch, epoch_count = magic_prime // 40320.
        ({"epoch_samples": 40320}, 2926181, (2520, 72 * 2520)),
        ({"epoch_samples": 40320, "exit_tokens": 1498226207}, 2926181, (2520, 182889)),
        ({"epoch_samples": 40320, "epoch_count": 3}, 2926181, (2520, 7560)),
        ({"epoch_samples": 40320}, 1000, (2520, 62)),  # less than one mini-epoch: one pass
        ({"epoch_samples": 100}, 1000, (6, 60)),
        ({"epoch_steps": 7, "epoch_count": 2}, 1000, (7, 14)),
        ({}, 1000, (62, 62)),
    ],
)
def test_lengths_of_epochs_and_runs(
    settings: dict[str, Any], num_slots: int, expected: tuple[int, int]
) -> None:
    config = TrainConfig.from_flat({"micro_bsz": 16, "ctx_len": 512, **settings})
    plan = make_plan(config, world_size=1, num_slots=num_slots)
    assert (plan.epoch_steps, plan.total_steps) == expected


def test_weights_kept_in_bf16_give_the_bits_of_weights_cast_in_each_micro_batch(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"micro_bsz": 2, "accumulate_grad_batches": 2, "exit_tokens": 6 * 4 * 32}
    for how in ("kept", "cast"):
        train(text, tmp_path / how, precision="bf16", working_weights=how, **sizes)
        said = "matrices in bf16 written once per step" in capsys.readouterr().out
        assert said is (how == "kept")
    assert losses(tmp_path / "kept") == losses(tmp_path / "cast")
    kept, cast = (load_weights(tmp_path / how / "rwkv-final.pth") for how in ("kept", "cast"))
    assert all(torch.equal(kept[name], cast[name]) for name in cast)


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({"accumulate_grad_batches": 2}, True),
        ({"chunk_len": 256}, True),
        ({"accumulate_grad_batches": 2, "grad_cp": True}, False),
        ({}, False),
        ({"working_weights": "kept"}, True),
        ({"working_weights": "cast", "accumulate_grad_batches": 2}, False),
        ({"precision": "fp32", "working_weights": "kept"}, False),
    ],
)
def test_weights_are_kept_where_a_step_casts_them_several_times(
    changes: dict[str, object], is_kept: bool
) -> None:
    assert TrainConfig.from_flat(changes).keeps_working_weights is is_kept


def test_a_precision_that_the_kernel_has_anyway_is_told(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(text, tmp_path, init_only=True, kernel_precision="high")
    said = capsys.readouterr().out
    assert "kernel_precision='high' does nothing with the kernel chunked" in said


def test_compile_on_a_cpu_without_a_compiler_is_refused_before_the_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"compile=true needs a C\+\+ compiler"):
        train(text, tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()
