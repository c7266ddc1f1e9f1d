"""`make gpu-check` on toy sizes without a GPU: so that the machine that has one meets no slip."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, peers
from benchmarks.train_step import Training, largest
from rwkvtune.models import RWKV7Config

ROOT = Path(__file__).resolve().parents[2]

# A peer as wind_rwkv's package looks from outside, in plain PyTorch: its decay is exp(-exp(w)).
WIND = """
import torch

def load_chunked_cuda(head_size):
    assert head_size == 64

def attn_chunked_cuda(r, w, k, v, a, b):
    S = torch.zeros(r.shape[0], r.shape[2], 64, 64)
    outputs = []
    for t in range(r.shape[1]):
        r_, w_, k_, v_, a_, b_ = (x[:, t].float() for x in (r, w, k, v, a, b))
        S = S * torch.exp(-torch.exp(w_))[:, :, None] + (S @ a_[..., None]) * b_[:, :, None]
        S = S + v_[..., None] * k_[:, :, None]
        outputs.append((S @ r_[..., None])[..., 0])
    return torch.stack(outputs, 1).to(r.dtype), S
"""


@pytest.fixture
def folder_of_peers(tmp_path: Path) -> Path:
    package = tmp_path / "wind_rwkv" / "wind_rwkv" / "rwkv7"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(WIND)
    (tmp_path / "RWKV-LM").mkdir()
    return tmp_path


def test_the_whole_command_runs_on_toy_sizes(
    tmp_path: Path, folder_of_peers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, gpu-check itself runs")
    monkeypatch.setattr(gpu_check.Check, "run_tests", lambda self: "passed")
    monkeypatch.setattr(gpu_check, "CHOICES", [("wkv7", 16, "high")])
    monkeypatch.setattr(peers, "present", lambda folder: ["wind_rwkv", "rwkv-lm"])
    check = gpu_check.Check("cpu", tiny=True, peers=folder_of_peers)
    assert check.run(tmp_path / "out") == 0
    (file,) = (tmp_path / "out").iterdir()
    result = json.loads(file.read_text())
    assert {"device", "versions", "wkv7_fwd_bwd_ms", "step", "peers"} <= result.keys()
    assert result["failed"] == [] and result["left_out"] == []
    assert {row["grad_cp"] for row in result["step"]} == {False, True}
    assert len(result["step"]) == 8 and all(row["tokens_per_s"] > 0 for row in result["step"])
    (choice,) = result["wkv7_choices"]
    assert choice["largest_error"] < 1e-2 and choice["fwd_bwd_ms"] > 0
    wind, lm = result["peers"]["wind_rwkv"], result["peers"]["rwkv-lm"]
    assert wind["ratios"]["wkv7_fwd_bwd"] > 0
    assert wind["difference_of_y"]["chunked_cuda"] < 1e-2  # the same recurrence
    assert lm["ratios"] == {} and lm["error"]  # its sources are not there; the rest went on


def test_parts_for_which_there_is_no_time_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LIMIT_S", 0.0)
    assert gpu_check.Check("cpu", tiny=True, peers=None).run(tmp_path) == 1
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert result["step"] == [] and result["failed"] == []
    assert {"gpu_tests", "wkv7_fwd_bwd_ms", "step", "peers"} <= set(result["left_out"])


def test_a_part_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> str:
        raise RuntimeError("no luck")

    quick = ("gpu_tests", "copy_gb_per_s")
    monkeypatch.setattr(gpu_check.Check, "has_time", lambda self, needs_s, name: name in quick)
    monkeypatch.setattr(gpu_check.Check, "run_tests", broken)
    assert gpu_check.Check("cpu", tiny=True, peers=None).run(tmp_path) == 1
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert result["failed"] == ["gpu_tests: RuntimeError: no luck"]
    assert result["copy_gb_per_s"] > 0


def test_what_is_known_is_written_before_the_device_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def interrupted(self: object) -> float:
        raise KeyboardInterrupt

    quick = ("gpu_tests", "copy_gb_per_s")
    monkeypatch.setattr(gpu_check.Check, "has_time", lambda self, needs_s, name: name in quick)
    monkeypatch.setattr(gpu_check.Check, "run_tests", lambda self: "passed")
    monkeypatch.setattr(gpu_check, "free_memory", lost)
    monkeypatch.setattr(gpu_check.Check, "measure_copies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.Check("cpu", tiny=True, peers=None).run(tmp_path)
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert result["gpu_tests"] == "passed" and "illegal memory" in result["failed"][0]
    assert {"device", "versions", "wkv7_fwd_bwd_ms", "step", "peers"} <= result.keys()


def test_a_command_that_says_much_does_not_wait_and_ends_with_its_children() -> None:
    talks = "import subprocess, time; print('x' * 10**6, flush=True); "
    talks += "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    running = gpu_check.Running([sys.executable, "-c", talks])
    assert running.wait(1.0) is None
    while running.told().count("\n") < 2:
        time.sleep(0.05)
    child = Path("/proc") / running.told().split()[1]
    running.end()
    for _ in range(100):
        if not child.exists() or "(sleep) Z" in (child / "stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the child still runs")


def test_each_gpu_test_is_in_one_of_the_shares() -> None:
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_gpu.py").read_text(), re.M)
    shares = gpu_check.TESTS_SIDE_BY_SIDE
    for name in names:
        # As pytest's -k reads them: a word is true where it is in the name.
        words = {word: word in name for word in ("wkv", "model")}
        assert [eval(share, words) for share in shares].count(True) == 1, name
    assert len(names) > 4


def test_a_batch_that_fits_once_and_then_no_more_is_made_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = Training(RWKV7Config(vocab_size=32, n_layer=1, n_embd=64), "fp32", "cpu")
    monkeypatch.setattr(training, "fits", lambda n, ctx_len, grad_cp: n <= 16)

    def measured(*, micro_bsz: int, **unused: object) -> dict[str, int]:
        if micro_bsz > 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"micro_bsz": micro_bsz}

    monkeypatch.setattr(training, "measured", measured)
    assert training.measured_at_most(64, ctx_len=8, grad_cp=False, repeats=1) == {"micro_bsz": 14}


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 29, 64, 100])
def test_the_largest_batch_is_found_to_an_eighth(limit: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    found = largest(fits, 64)
    reached = min(limit, 64)
    assert found <= reached and reached - found <= max(0, found // 8)
    assert len(tried) <= 11 and max(tried) <= max(1, min(64, 2 * max(limit, 1)))
