"""What a result file says about where its numbers come from, and how times are taken."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rwkvtune import __version__


def describe(device: str) -> dict[str, Any]:
    """Date, device, and versions; no host names."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    versions = {
        "rwkvtune": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        versions["cuda"] = torch.version.cuda or torch.version.hip or "none"
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions["triton"] = metadata.version("triton")
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    flags = {w for line in lines if line.startswith("flags") for w in line.split()}
    extra = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{', '.join(names) or platform.machine()} ({' '.join(extra)})"


BF16_TFLOPS = (
    ("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("A100", 312),
    ("B200", 2250), ("MI300X", 1307), ("L40S", 362), ("L4", 121), ("RTX 4090", 165),
)  # fmt: skip
"""Dense bf16 products with fp32 sums by the makers' data sheets, by part of the device's name."""


def data_sheet_tflops(device: str, dtype: torch.dtype) -> int | None:
    """The peak rate that this device is sold with; None where it is not known here."""
    if device != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in BF16_TFLOPS if part in name), None)


def copy_gb_per_s(device: str, size_gb: float = 1.0) -> float:
    """Bytes read and written per second by a plain copy of a tensor of this size."""
    x = torch.zeros(int(size_gb * 1e9), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    taken = interleaved({"copy": lambda: y.copy_(x)}, device, 5)["copy"]
    return round(2 * size_gb / taken * 1e3, 1)


def milliseconds(work: Callable[[], object], device: str) -> float:
    """One run of `work`, until the device has finished it."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def interleaved(
    works: dict[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each, taken in turn so that a slow moment of the machine hits all
    alike."""
    for work in works.values():
        milliseconds(work, device)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(milliseconds(work, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak_memory(device: str) -> None:
    """Let the peak of rwkvtune's PeakMemory begin anew from what is in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # man 5 proc: VmHWM


def write(folder: Path, name: str, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date']}-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    return path
