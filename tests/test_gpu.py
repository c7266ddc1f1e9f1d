"""What `make gpu-check` runs first: the same witnesses as on the CPU, on a CUDA device."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwkvtune.adapters.quant import QuantizedLinear
from rwkvtune.data.build import build_token_files
from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy
from rwkvtune.kernels.wkv5 import wkv5
from rwkvtune.kernels.wkv6 import wkv6
from rwkvtune.kernels.wkv7 import wkv7
from rwkvtune.models import build_model, config_from_state_dict
from rwkvtune.training.config import TrainConfig
from rwkvtune.training.lm import train_language_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-3), (torch.float16, 4e-3)]
)
def test_wkv7_on_the_gpu_follows_the_golden_fp64_run(
    golden: Path, dtype: torch.dtype, tolerance: float
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    content = load_file(golden / "wkv7-ops.safetensors")
    given = [content[n].double() for n in ("r", "w_raw", "k", "v", "a", "b")]
    exact = [x.to(dtype).double().requires_grad_() for x in given]
    state = content["s0.state_in"]
    dy = content["gy"].to(dtype).double()
    r, w, k, v, a, b = exact
    y, _ = wkv7(r, w, k, v, a, b, state.double(), backend="reference")
    y.backward(dy)
    ours = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    r, w, k, v, a, b = ours
    found, _ = wkv7(r, w, k, v, a, b, state.float().cuda())
    found.backward(dy.to("cuda", dtype))
    pairs = [(found, y), *((x.grad, e.grad) for x, e in zip(ours, exact, strict=True))]
    for tensor, truth in pairs:
        assert tensor is not None and truth is not None
        error = (tensor.detach().double().cpu() - truth.detach()).norm() / truth.detach().norm()
        assert error < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-3), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("door", [wkv5, wkv6])
def test_wkv5_and_wkv6_on_the_gpu_follow_the_golden_fp64_run(
    golden: Path, door: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, tolerance: float
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    file = load_file(golden / "wkv56-ops.safetensors")
    prefix = door.__name__ + "."
    content = {n.removeprefix(prefix): x.double() for n, x in file.items() if n.startswith(prefix)}
    exact = [content[n] for n in ("r", "k", "v", "w", "u")]
    exact = [x.to(dtype).double().requires_grad_() for x in exact[:3]] + [
        x.requires_grad_() for x in exact[3:]
    ]
    state, dy = content["s0.state_in"], content["gy"].to(dtype).double()
    y, _ = door(*exact, state, backend="reference")
    y.backward(dy)
    types = [dtype] * 3 + [torch.float32] * 2
    ours = [x.detach().to("cuda", t).requires_grad_() for x, t in zip(exact, types, strict=True)]
    found, _ = door(*ours, state.float().cuda())
    found.backward(dy.to("cuda", dtype))
    for tensor, truth in [
        (found, y),
        *((x.grad, e.grad) for x, e in zip(ours, exact, strict=True)),
    ]:
        assert tensor is not None and truth is not None
        error = (tensor.detach().double().cpu() - truth.detach()).norm() / truth.detach().norm()
        assert error < tolerance


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_the_model_on_the_gpu_has_the_golden_logits_loss_and_gradients(
    golden: Path, version: str
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    content = load_file(golden / f"{version}-small.safetensors")
    weights = {n[2:]: w.float() for n, w in content.items() if n.startswith("w.")}
    model = build_model(config_from_state_dict(weights))
    model.load_state_dict(weights)
    model.cuda()
    ids, targets = content["idx"].cuda(), content["targets"].cuda()
    logits, _ = model(ids)
    assert (logits.cpu() - content["logits"]).abs().max() < 2e-5
    loss, _ = model(ids, head=partial(head_cross_entropy, targets=targets, l2wrap=0.0))
    (loss / ids.numel()).backward()
    for name, parameter in model.named_parameters():
        wanted = content.get(f"g.{name}")
        if wanted is not None and parameter.grad is not None:
            error = (parameter.grad.cpu() - wanted).abs().max()
            assert error < 1e-3 * wanted.abs().max(), name


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_a_run_on_the_gpu_learns_and_goes_on_where_it_stopped(
    tmp_path: Path, precision: str
) -> None:
    text = Path(__file__).parent.parent / "rwkvtune" / "demo" / "tinyshakespeare.txt"
    build_token_files(text, tmp_path / "text", "chars", val_share=0.1)

    def run(tokens: int) -> None:
        settings = {
            "data_file": str(tmp_path / "text"),
            "n_layer": 2,
            "n_embd": 128,
            "ctx_len": 128,
            "exit_tokens": tokens,
            "lr_init": 3e-3,
            "lr_schedule": "constant",
            "accelerator": "gpu",
            "devices": 1,
            "precision": precision,
            "log_every": 1,
            "proj_dir": str(tmp_path / "run"),
        }
        assert train_language_model(TrainConfig.from_flat(settings)).exit_code == 0

    run(30 * 8 * 128)
    run(60 * 8 * 128)
    with open(tmp_path / "run" / "metrics.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 60
    assert losses[0] > 4.0  # ln 66 = 4.19: nothing known
    assert sum(losses[-5:]) / 5 < 2.6  # letter frequencies alone give 3.3


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_matrix_packed_on_the_gpu_gives_the_product_that_the_cpu_gives(kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the dev extra")
    torch.backends.cuda.matmul.allow_tf32 = False
    linear = torch.nn.Linear(96, 64, bias=False)
    here = QuantizedLinear.of(linear, kind)
    x = torch.randn(3, 96)
    expected = here(x)
    there = QuantizedLinear.of(linear.cuda(), kind)
    # Ties between two levels may fall either way.
    assert (there.weight.cpu() != here.weight).float().mean() < 1e-3
    inputs = x.cuda().requires_grad_()
    y = here.cuda()(inputs)
    assert (y.cpu() - expected).abs().max() < 1e-4
    (grad,) = torch.autograd.grad(y.sum(), inputs)
    assert (grad - here.weight.sum(0)).abs().max() < 1e-4
