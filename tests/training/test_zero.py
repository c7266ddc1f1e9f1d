"""DeepSpeed as the engine: where it is refused, and, where it is installed, the numbers of one
process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import UserError
from rwkvtune.training.config import DeviceOptions
from rwkvtune.training.fabric import runs_on_deepspeed
from rwkvtune.training.zero import Gathered, is_installed, lacking
from tests.training.runs import Blow, flags, losses, metrics, run, start_ranks, trained_rows

SETTINGS = {
    "n_layer": 2, "n_embd": 64, "ctx_len": 32, "threads": 1, "precision": "fp32",
    "accelerator": "cpu", "micro_bsz": 1, "accumulate_grad_batches": 2, "epoch_steps": 20,
    "epoch_count": 1, "log_every": 1, "freeze": "blocks.0.ffn.*",
}  # fmt: skip


def options(**changes: object) -> DeviceOptions:
    return DeviceOptions(**{"strategy": "deepspeed_stage_2", **changes})  # type: ignore[arg-type]


def test_what_deepspeed_lacks_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rwkvtune.training.zero.is_installed", lambda: False)
    assert not runs_on_deepspeed(options(), 2)
    with pytest.raises(UserError, match="the package deepspeed is not installed.*--engine torch"):
        runs_on_deepspeed(options(engine="deepspeed"), 2)
    monkeypatch.setattr("rwkvtune.training.zero.is_installed", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("os.defpath", str(tmp_path))
    assert not runs_on_deepspeed(options(), 2)
    with pytest.raises(UserError, match="ninja and a C\\+\\+ compiler .* missing"):
        runs_on_deepspeed(options(engine="deepspeed"), 2)
    for never in (options(engine="torch"), options(strategy="ddp", engine="deepspeed")):
        assert not runs_on_deepspeed(never, 2)
    assert not runs_on_deepspeed(options(engine="deepspeed"), 1), "nothing to shard"


def test_what_is_sharded_is_brought_together_only_when_it_is_written(tmp_path: Path) -> None:
    brought: list[str] = []

    def weight() -> torch.Tensor:
        brought.append("w")
        return torch.arange(6.0)

    named = {"w": Gathered.of((2, 3), weight)}
    assert named["w"].detach().shape == (2, 3) and brought == []
    save_weights(tmp_path / "w.pth", named)
    assert brought == ["w"]
    assert torch.equal(load_weights(tmp_path / "w.pth")["w"], torch.arange(6.0).view(2, 3))


@pytest.mark.skipif(not is_installed() or bool(lacking()), reason="DeepSpeed cannot run here")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_stopped_and_gone_on_with_by_itself_and_by_one_process_equals_one_process(
    stage: int, text: Path, tmp_path: Path
) -> None:
    """Frozen parameters, accumulation and clipping included."""

    def args(folder: str, **changes: object) -> list[str]:
        data = {"data_file": text, "proj_dir": tmp_path / folder}
        return ["train", *flags(SETTINGS | data | changes)]

    one = {"accumulate_grad_batches": 4}
    assert run(args("one", **one), tmp_path / "out", rows=tmp_path / "rows-one").code == 0
    zero = {"strategy": f"deepspeed_stage_{stage}", "engine": "deepspeed"}
    folder, rows = tmp_path / "zero", tmp_path / "rows-zero"
    in_fourth_step = {1: Blow(7, f"{rows}-", signal.SIGTERM)}
    for steps in (4, 8):
        ranks = start_ranks(args("zero", **zero), tmp_path, 2, blows=in_fourth_step, rows=rows)
        ended = [rank.wait() for rank in ranks]
        assert [e.code for e in ended] == [143, 0], ended
        assert len(metrics(folder)) == steps
    assert run(args("zero", **one), tmp_path / "out", rows=rows).code == 0
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    norms = [[float(row["grad_norm"]) for row in metrics(tmp_path / f)] for f in ("zero", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert trained_rows(rows) == trained_rows(tmp_path / "rows-one")
