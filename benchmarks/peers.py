"""Other implementations of x070 beside ours: same shapes, same data, in turn on the same device.

    python -m benchmarks.peers NAME [--peers FOLDER] [--build] [--tiny] [--device cuda]

NAME is one of PEERS. flash-linear-attention must be installed; the others lie in FOLDER as their
authors keep them: RWKV-LM (or train_temp alone) and wind_rwkv, compiled into FOLDER/build by nvcc,
which --build does beforehand. Nothing of theirs is part of this repository. Prints one line of
JSON: commit, milliseconds, and ratios, which are above 1 where ours is faster or smaller.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, wkv
from rwkvtune.errors import UserError
from rwkvtune.kernels.wkv7.reference import LOG_DECAY_SCALE
from rwkvtune.models import RWKV7Config

SHAPE: wkv.Shape = (8, 4096, 64, 64)
TINY_SHAPE: wkv.Shape = (1, 32, 2, 64)
STEPS = ((12, 768, 512, 16), (12, 768, 4096, 4), (24, 2048, 512, 16), (24, 2048, 4096, 2))
"""n_layer, n_embd, ctx_len and micro_bsz of the whole steps."""
NVCC_FLAGS = ["-O3", "--use_fast_math", "-Xptxas", "-O3", "--extra-device-vectorization"]

Recurrence = tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]
"""What a peer's kernel takes for our raw decays, and the kernel: r, w, k, v, a, b -> y."""


def log_decay(w: Tensor) -> Tensor:
    return (LOG_DECAY_SCALE * torch.sigmoid(w.float())).to(w.dtype)


def log_of_minus_log_decay(w: Tensor) -> Tensor:
    return torch.log(-LOG_DECAY_SCALE * torch.sigmoid(w.float())).to(w.dtype)


def flash_linear_attention(folder: Path | None) -> dict[str, Recurrence]:
    from fla.ops.rwkv7 import chunk_rwkv7  # type: ignore[import-not-found]

    def call(**options: bool) -> Callable[..., Tensor]:
        return lambda r, w, k, v, a, b: chunk_rwkv7(r, w, k, v, a, b, scale=1.0, **options)[0]

    return {
        "chunk_rwkv7": (log_decay, call()),
        # For decays that are bounded as those of x070 are.
        "chunk_rwkv7 safe_gate": (log_decay, call(safe_gate=True)),
    }


def wind_rwkv(folder: Path | None) -> dict[str, Recurrence]:
    sys.path.insert(0, str(found_in(folder, "wind_rwkv")))
    theirs = importlib.import_module("wind_rwkv.rwkv7")
    theirs.load_chunked_cuda(64)
    return {
        "chunked_cuda": (
            log_of_minus_log_decay,
            lambda *inputs: theirs.attn_chunked_cuda(*inputs)[0],
        )
    }


def rwkv_lm(folder: Path | None) -> dict[str, Recurrence]:
    return {
        "clampw": clampw(folder, "rwkv7_clampw", "rwkv7_clampw.cu"),
        "clampw_v3": clampw(folder, "rwkv7_clampw_v3", "rwkv7_clampw_v3_for_h100.cu"),
    }


def rwkv_lm_alt(folder: Path | None) -> dict[str, Recurrence]:
    """The third form of their kernel, which cannot be loaded beside the second."""
    return {"clampw_v3 alt": clampw(folder, "rwkv7_clampw_v3", "rwkv7_clampw_v3_for_h100_alt.cu")}


def clampw(folder: Path | None, name: str, file: str) -> Recurrence:
    from torch.utils.cpp_extension import load

    source = train_temp(folder) / "cuda"
    load(
        name=Path(file).stem,
        sources=[str(source / file), str(source / f"{name}.cpp")],
        is_python_module=False,
        extra_cuda_cflags=["-D_N_=64", "-D_CHUNK_LEN_=16", *NVCC_FLAGS],
    )
    return lambda w: w, with_gradients(getattr(torch.ops, name))


def with_gradients(ops: Any) -> Callable[..., Tensor]:
    """RWKV-LM's operators, with the tensors that they want to be given room for."""

    class Clampw(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            B, T, H, N = inputs[0].shape
            y = torch.empty_like(inputs[0])
            states = y.new_empty(B, H, T // 16, N, N, dtype=torch.float32)
            removed = y.new_empty(B, T, H, N, dtype=torch.float32)
            ops.forward(*inputs, y, states, removed)
            ctx.save_for_backward(*inputs, states, removed)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
            *inputs, states, removed = ctx.saved_tensors
            gradients = tuple(torch.empty_like(x) for x in inputs)
            ops.backward(*inputs, dy.contiguous(), states, removed, *gradients)
            return gradients

    return lambda *inputs: Clampw.apply(*inputs)


RECURRENCES: dict[str, Callable[[Path | None], dict[str, Recurrence]]] = {
    "flash-linear-attention": flash_linear_attention,
    "wind_rwkv": wind_rwkv,
    "rwkv-lm": rwkv_lm,
    "rwkv-lm-alt": rwkv_lm_alt,
}
PEERS = (*RECURRENCES, "rwkv-lm-step")


def found_in(folder: Path | None, name: str) -> Path:
    if folder is None or not (folder / name).is_dir():
        raise UserError(f"there is no {name} in the folder of peers ({folder})")
    return (folder / name).resolve()


def train_temp(folder: Path | None) -> Path:
    if folder is not None and (folder / "train_temp").is_dir():
        return (folder / "train_temp").resolve()
    return found_in(folder, "RWKV-LM") / "RWKV-v7" / "train_temp"


def present(folder: Path | None) -> list[str]:
    """The peers that are there to be built."""
    names = []
    if importlib.util.find_spec("fla") is not None:
        names.append("flash-linear-attention")
    if folder is not None and (folder / "wind_rwkv").is_dir():
        names.append("wind_rwkv")
    if folder is not None and any((folder / d).is_dir() for d in ("RWKV-LM", "train_temp")):
        names += ["rwkv-lm", "rwkv-lm-alt", "rwkv-lm-step"]
    return names


def commit_of(name: str, folder: Path | None) -> str:
    if name == "flash-linear-attention":
        return metadata.version(name)
    place = train_temp(folder) if name.startswith("rwkv-lm") else found_in(folder, name)
    told = subprocess.run(
        ["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return told.stdout.strip() or "not a git checkout"


def compare_recurrence(name: str, folder: Path | None, device: str, tiny: bool) -> dict[str, Any]:
    """wkv7 forward and backward in bf16: milliseconds of each variant, and how far its output is
    from ours."""
    theirs = RECURRENCES[name](folder)
    inputs = wkv.make_inputs("wkv7", TINY_SHAPE if tiny else SHAPE, torch.bfloat16, device)
    dy = torch.ones_like(inputs[0])
    ours = wkv.KERNELS["wkv7"](*inputs)[0].detach().float()
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: torch.autograd.grad(wkv.KERNELS["wkv7"](*inputs)[0], inputs, dy)
    }
    difference, failed = {}, {}
    for variant, (decay, kernel) in theirs.items():
        own = [x.detach().clone().requires_grad_() for x in inputs]
        own[1] = decay(inputs[1].detach()).requires_grad_()

        def work(kernel: Any = kernel, own: Any = own) -> object:
            return torch.autograd.grad(kernel(*own), own, dy)

        try:
            away = (kernel(*own).detach().float() - ours).norm() / ours.norm()
            difference[variant] = round(float(away), 5)
            work()
            works[variant] = work
        except Exception as error:  # one of theirs may not run on this device
            failed[variant] = f"{type(error).__name__}: {error}"[:300]
    times = machine.interleaved(works, device, 3 if tiny else 10)
    fastest = min((times[v] for v in times if v != "ours"), default=None)
    return {
        "ms": {v: round(ms, 3) for v, ms in times.items()},
        "difference_of_y": difference,
        "failed": failed,
        "ratios": {} if fastest is None else {"wkv7_fwd_bwd": round(fastest / times["ours"], 3)},
    }


def compare_steps(folder: Path | None, device: str, tiny: bool) -> dict[str, Any]:
    """Whole training steps in bf16 without gradient checkpointing, against train_temp's model with
    its fused kernels."""
    from benchmarks.train_step import Training  # Fabric, which the recurrences do without

    theirs = their_model_class(folder)
    found: dict[str, Any] = {"rows": [], "ratios": {}}
    for n_layer, n_embd, ctx_len, micro_bsz in ((2, 64, 32, 1),) if tiny else STEPS:
        config = RWKV7Config(vocab_size=256 if tiny else 65536, n_layer=n_layer, n_embd=n_embd)
        row: dict[str, Any] = {"n_layer": n_layer, "n_embd": n_embd, "ctx_len": ctx_len}
        row["micro_bsz"] = micro_bsz
        for who in ("ours", "theirs"):
            step: Callable[[], None] = (
                Training(config, "bf16", device).step(micro_bsz, ctx_len)
                if who == "ours"
                else their_step(theirs, config, device, micro_bsz, ctx_len)
            )
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row[f"{who}_ms"] = round(machine.interleaved({"": step}, device, 5)[""], 2)
            if device == "cuda":
                row[f"{who}_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            del step
            if device == "cuda":
                torch.cuda.empty_cache()
        found["rows"].append(row)
        size = f"L{n_layer} D{n_embd} ctx {ctx_len}"
        found["ratios"][f"step {size}"] = round(row["theirs_ms"] / row["ours_ms"], 3)
        if device == "cuda":
            found["ratios"][f"memory {size}"] = round(row["theirs_gb"] / row["ours_gb"], 3)
    return found


def their_model_class(folder: Path | None) -> Any:
    """train_temp's RWKV; importing it compiles its kernels."""
    place = train_temp(folder)
    if importlib.util.find_spec("pytorch_lightning") is None:
        lightning = types.ModuleType("pytorch_lightning")
        utilities = types.ModuleType("pytorch_lightning.utilities")
        strategies = types.ModuleType("pytorch_lightning.strategies")
        vars(lightning).update(LightningModule=nn.Module)
        vars(utilities).update(rank_zero_info=print, rank_zero_only=lambda function: function)
        vars(strategies).update(DeepSpeedStrategy=object)
        sys.modules |= {m.__name__: m for m in (lightning, utilities, strategies)}
    os.environ |= {
        "RWKV_MY_TESTING": "x070",
        "RWKV_KERNEL": "@rwkv3",
        "RWKV_CTXLEN": "4096",
        "RWKV_HEAD_SIZE": "64",
        "RWKV_HEAD_L2WRAP_CE_CHUNK": "0",
        "RWKV_FLOAT_MODE": "bf16",
        "RWKV_JIT_ON": "1",
    }
    os.chdir(place)  # their sources are named relative to it
    sys.path.insert(0, str(place))
    return importlib.import_module("src.model").RWKV


def their_step(
    model_class: Any, config: RWKV7Config, device: str, micro_bsz: int, ctx_len: int
) -> Callable[[], None]:
    """A step as DeepSpeed does it for them, without its overhead: bf16 weights and gradients,
    fp32 master weights in torch's fused AdamW."""
    sizes = {"n_layer": config.n_layer, "n_embd": config.n_embd, "vocab_size": config.vocab_size}
    args = types.SimpleNamespace(
        **sizes, my_testing="x070", head_size=64, dim_att=config.n_embd, dim_ffn=4 * config.n_embd,
        ctx_len=ctx_len, grad_cp=0, weight_decay=0.1, accelerator="gpu",
    )  # fmt: skip
    model = model_class(args).to(device, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    weights = list(model.parameters())
    masters = [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.99), eps=1e-18, fused=True)
    ids = torch.randint(config.vocab_size, (micro_bsz, ctx_len + 1), device=device)
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step() -> None:
        model.training_step(batch, 0).backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--build", action="store_true", help="compile it, measure nothing")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    options = parser.parse_args()
    folder = None if options.peers is None else options.peers.resolve()
    if folder is not None:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder / "build"))
    is_step = options.name == "rwkv-lm-step"
    found: dict[str, Any] = {"commit": None, "ratios": {}}
    try:
        found["commit"] = commit_of(options.name, folder)
        if options.build:
            if is_step:
                their_model_class(folder)
            else:
                RECURRENCES[options.name](folder)
        elif is_step:
            found |= compare_steps(folder, options.device, options.tiny)
        else:
            found |= compare_recurrence(options.name, folder, options.device, options.tiny)
    except Exception as error:  # whatever a peer does wrong, the others are measured
        found["error"] = f"{type(error).__name__}: {error}"[:600]
    print(json.dumps(found))
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main())
