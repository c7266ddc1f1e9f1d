"""Speed and memory of the wkv kernels: ratios within one run, since machines differ.

    python -m benchmarks.wkv [--kernel wkv7] [--out benchmarks/results] [--device cpu|cuda]

For each kernel it measures the matrix form against the per-token loop (in turns, medians), cost per
token and peak memory over sequence lengths from 512 to 32768, and one decoding step. Writes one
JSON file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from rwkvtune.kernels.wkv5 import wkv5
from rwkvtune.kernels.wkv6 import wkv6
from rwkvtune.kernels.wkv7 import wkv7

KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "wkv7": wkv7,
    "wkv6": wkv6,
    "wkv5": wkv5,
}

Shape = tuple[int, int, int, int]
"""B, T, H, N"""

MATRIX_FORM = {"cpu": "chunked", "cuda": "triton_gpu"}
"""The backend that is measured, by device."""

RATIO_SHAPE: Shape = (4, 512, 12, 64)
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]


def make_inputs(kernel: str, shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """What a kernel takes before its state, of the sizes that a model produces, wanting
    gradients."""
    torch.manual_seed(0)
    r, w, k, v, kk, gate = (torch.randn(*shape) for _ in range(6))
    if kernel == "wkv7":
        kk = torch.nn.functional.normalize(kk, dim=-1)
        tensors = [r, 2 * w - 1, 0.3 * k, v, -kk, kk * torch.sigmoid(gate)]
    else:
        w = 2 * w - 3
        tensors = [r, 0.3 * k, v, w[0, 0] if kernel == "wkv5" else w, gate[0, 0]]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def time_once(kernel: str, inputs: list[Tensor], backend: str, device: str) -> tuple[float, float]:
    """Milliseconds of one forward, and of one forward with its backward."""
    dy = torch.ones_like(inputs[0])
    outputs: list[Tensor] = []
    forward = machine.milliseconds(
        lambda: outputs.append(KERNELS[kernel](*inputs, backend=backend)[0]), device
    )
    backward = machine.milliseconds(lambda: torch.autograd.grad(outputs, inputs, [dy]), device)
    return forward, forward + backward


def compare_with_loop(
    kernel: str, shape: Shape, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, Any]:
    """Matrix form and loop in turns; the matrix form five times for each loop."""
    inputs = make_inputs(kernel, shape, dtype, device)
    form = MATRIX_FORM[device]
    times: dict[str, list[tuple[float, float]]] = {"reference": [], form: []}
    for backend in times:
        time_once(kernel, inputs, backend, device)
    for _ in range(repeats):
        times["reference"].append(time_once(kernel, inputs, "reference", device))
        times[form] += (time_once(kernel, inputs, form, device) for _ in range(5))
    result: dict[str, Any] = {"shape_BTHN": shape, "dtype": str(dtype).removeprefix("torch.")}
    for index, name in enumerate(["forward", "forward_backward"]):
        medians = {
            backend: statistics.median(pair[index] for pair in pairs)
            for backend, pairs in times.items()
        }
        fastest = {backend: min(pair[index] for pair in pairs) for backend, pairs in times.items()}
        result[name] = {
            "reference_ms": round(medians["reference"], 2),
            f"{form}_ms": round(medians[form], 2),
            "ratio": round(medians["reference"] / medians[form], 2),
            # Of a busy machine's times the fastest say most.
            "reference_fastest_ms": round(fastest["reference"], 2),
            f"{form}_fastest_ms": round(fastest[form], 2),
            "ratio_of_fastest": round(fastest["reference"] / fastest[form], 2),
        }
    return result


def resident_bytes(field: str) -> int:
    """A memory field of this process as Linux counts it: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(kilobytes) * 1024


def peak_bytes(kernel: str, shape: Shape, dtype: torch.dtype, device: str) -> int:
    """Peak memory that one forward and backward add to their inputs."""
    inputs = make_inputs(kernel, shape, dtype, device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (Linux)
        before = resident_bytes("VmRSS")
        time_once(kernel, inputs, MATRIX_FORM[device], device)
        return resident_bytes("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time_once(kernel, inputs, MATRIX_FORM[device], device)
    return torch.cuda.max_memory_allocated() - before


def sweep_lengths(
    kernel: str, dtype: torch.dtype, device: str, repeats: int
) -> list[dict[str, Any]]:
    """Cost per token and peak memory of forward and backward at B1 H12 N64, lengths in turns."""
    times: dict[int, list[float]] = {T: [] for T in LENGTHS}
    for repeat in range(repeats + 1):
        for T in LENGTHS:
            inputs = make_inputs(kernel, (1, T, 12, 64), dtype, device)
            # Short lengths as often as the longest: the same number of tokens, warm-up apart.
            for _ in range(max(1, min(8, LENGTHS[-1] // T // 4))):
                elapsed = time_once(kernel, inputs, MATRIX_FORM[device], device)[1]
                if repeat:
                    times[T].append(elapsed)
    rows = []
    for T in LENGTHS:
        arguments = (kernel, (1, T, 12, 64), dtype, device)
        if device == "cuda":
            peak = peak_bytes(*arguments)
        else:  # a fresh process, because the peak of a process never falls
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_bytes, arguments)
        milliseconds = statistics.median(times[T])
        rows.append(
            {
                "T": T,
                "us_per_token": round(1e3 * milliseconds / T, 3),
                "us_per_token_fastest": round(1e3 * min(times[T]) / T, 3),
                "peak_bytes_per_token": round(peak / T),
            }
        )
    return rows


def time_decoding_step(kernel: str, device: str) -> float:
    """Microseconds of one token without gradients at B1 H12 N64, fp32: median of 200."""
    inputs = [x.detach() for x in make_inputs(kernel, (1, 1, 12, 64), torch.float32, device)]
    state = torch.zeros(1, 12, 64, 64, device=device)
    times = [
        machine.milliseconds(lambda: KERNELS[kernel](*inputs, state), device) for _ in range(220)
    ]
    return round(1e3 * statistics.median(times[20:]), 1)


def measure_choice(
    kernel: str, chunk_len: int, precision: str, shape: Shape, device: str
) -> dict[str, Any]:
    """Time, memory and accuracy of a Triton kernel called directly, bf16: accuracy is the relative
    RMS error of outputs and gradients against the loop in fp64 on the same inputs."""
    from rwkvtune.kernels.wkv6.reference import wkv6_reference
    from rwkvtune.kernels.wkv6.triton_gpu import wkv6_triton
    from rwkvtune.kernels.wkv7.reference import wkv7_reference
    from rwkvtune.kernels.wkv7.triton_gpu import wkv7_triton

    call: Callable[..., tuple[Tensor, Tensor]] = (
        partial(wkv7_triton, chunk_len=chunk_len) if kernel == "wkv7" else wkv6_triton
    )
    call = partial(call, precision=precision)
    inputs = make_inputs(kernel, shape, torch.bfloat16, device)
    dy = torch.ones_like(inputs[0])

    def work() -> None:
        torch.autograd.grad(call(*inputs)[0], inputs, dy)

    found: dict[str, Any] = {}
    if device == "cuda":
        work()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found["fwd_bwd_ms"] = round(
        machine.interleaved({"": work}, device, 5 if device == "cuda" else 1)[""], 3
    )
    if device == "cuda":
        found["peak_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)

    B, T, H, N = shape
    some = make_inputs(kernel, (min(B, 2), min(T, 200), min(H, 4), N), torch.bfloat16, device)
    exact = [x.detach().double().requires_grad_() for x in some]
    reference = wkv7_reference if kernel == "wkv7" else wkv6_reference
    errors = {}
    ours: tuple[Tensor, ...] = call(*some)
    truth: tuple[Tensor, ...] = reference(*exact)
    torch.manual_seed(1)
    upstream = [torch.randn_like(x) for x in ours]
    ours += torch.autograd.grad(ours, some, upstream)
    truth += torch.autograd.grad(truth, exact, [x.double() for x in upstream])
    named = zip(("y", "state", *(f"d{i}" for i in range(len(some)))), ours, truth, strict=True)
    for name, x, t in named:
        errors[name] = float(((x.double() - t).norm() / t.norm()).detach())
    worst = max(errors, key=lambda name: errors[name])
    return found | {"largest_error": float(f"{errors[worst]:.2e}"), "of": worst}


def measure(kernel: str, device: str, repeats: int) -> dict[str, Any]:
    """All numbers of one kernel."""
    found: dict[str, Any] = {"against_loop": []}
    for dtype in (torch.float32, torch.bfloat16):
        comparison = compare_with_loop(kernel, RATIO_SHAPE, dtype, device, repeats)
        print(kernel, json.dumps(comparison), flush=True)
        found["against_loop"].append(comparison)
    found["lengths_B1_H12_N64_float32"] = sweep_lengths(
        kernel, torch.float32, device, min(3, repeats)
    )
    for row in found["lengths_B1_H12_N64_float32"]:
        print(kernel, json.dumps(row), flush=True)
    found["decoding_step_us"] = time_decoding_step(kernel, device)
    print(f"{kernel} decoding step: {found['decoding_step_us']} us", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kernel", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    result = machine.describe(options.device)
    for kernel in options.kernel:
        result[kernel] = measure(kernel, options.device, options.repeats)
    name = "wkv" + "".join(sorted(kernel[-1] for kernel in options.kernel))
    machine.write(options.out, f"{name}-{options.device}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
