"""GPU tests, then GPU benchmarks, in one go: `make gpu-check OUT=dir`, under 8 minutes.

Writes <date>-<gpu>.json with the device, versions, whether the tests passed, and the measured rows.
Without a GPU it says so and exits 0, so that one command serves every machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEST_LIMIT_S = 180
BENCHMARK_LIMIT_S = 270


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    try:
        import torch
    except ImportError:
        print("gpu-check: this python has no torch; run `make venv`, or name one: PYTHON=...")
        return 2
    if not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no GPU here, so there is nothing to check"
        )
        return 0
    from benchmarks import machine

    # Only the file of GPU tests: a GPU machine may lack what the other files import.
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"]
    try:
        tests = "failed" if subprocess.run(command, timeout=TEST_LIMIT_S).returncode else "passed"
    except subprocess.TimeoutExpired:
        tests = f"not done in {TEST_LIMIT_S} s"
    result = machine.describe("cuda") | {"gpu_tests": tests} | benchmarks()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia "))
    machine.write(out, name.strip("-"), result)
    return 0 if tests == "passed" else 1


def benchmarks() -> dict[str, Any]:
    """wkv7 at B8 T4096 H64 N64, and training steps; stops beginning new ones when time is short."""
    import torch

    from benchmarks import train_step, wkv
    from rwkvtune.models import RWKV7Config

    begin = time.monotonic()
    found: dict[str, Any] = {"step": []}
    inputs = wkv.make_inputs("wkv7", (8, 4096, 64, 64), torch.bfloat16, "cuda")
    times = [wkv.time_once("wkv7", inputs, "auto", "cuda")[1] for _ in range(7)]
    found["wkv7_fwd_bwd_ms"] = round(statistics.median(times[2:]), 2)
    del inputs
    sizes = [(12, 768, 512, 16), (12, 768, 4096, 4), (24, 2048, 512, 8), (24, 2048, 4096, 2)]
    for n_layer, n_embd, ctx_len, micro_bsz in sizes:
        for grad_cp in (False, True):
            if time.monotonic() - begin > BENCHMARK_LIMIT_S:
                print(f"out of time for L{n_layer} D{n_embd} ctx {ctx_len} grad_cp {grad_cp}")
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            config = RWKV7Config(vocab_size=65536, n_layer=n_layer, n_embd=n_embd)
            found["step"].append(
                train_step.measure(
                    config,
                    "bf16",
                    device="cuda",
                    micro_bsz=micro_bsz,
                    ctx_len=ctx_len,
                    grad_cp=grad_cp,
                    repeats=3,
                )
            )
    found["adapters"] = adapters() if time.monotonic() - begin < BENCHMARK_LIMIT_S else "no time"
    return found


def adapters() -> Any:
    """Steps of LoRA and packed bases against full fine-tuning at L12 D768."""
    from importlib.util import find_spec

    import torch

    missing = [name for name in ("peft", "bitsandbytes") if find_spec(name) is None]
    if missing:
        print(f"no adapters measured: this python has no {' and no '.join(missing)}")
        return f"no {', '.join(missing)}"
    from benchmarks.adapters import measure_steps

    torch.cuda.empty_cache()
    return measure_steps("cuda", micro_bsz=8, ctx_len=512, repeats=3, vocab_size=65536)


if __name__ == "__main__":
    sys.exit(main())
