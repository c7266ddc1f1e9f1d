"""The Triton kernels compiled for GPUs that need not be there: registers, spills, shared memory.

    python -m benchmarks.ptx [--sm 80 90] [--head_size 64] [--ptx FOLDER] [--out benchmarks/results]

Compiles the recurrences of x070 and x060 and the fused pieces around them as a bf16 training step
calls them, and prints what each kernel takes on the device. A spill is bytes per thread that did
not fit into registers. Needs triton, not a GPU: triton brings NVIDIA's assembler along.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TYPES = {
    "i32": "T H C V tokens size chunks segments chunks_per_segment",
    "fp32": "eps smallest l2wrap",
    "*fp32": "inverse scores state final d_final d_state du mix k_k k_a r_k weight bias losses "
    "dmix dk_k dk_a dr_k dweight dbias",
    "*i64": "gold",
    "*u8": "reset counted",
}
"""Of a kernel's arguments by their names; the others are bf16 tensors."""
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90], help="compute capabilities")
    parser.add_argument("--head_size", type=int, default=64, choices=[32, 64, 128])
    parser.add_argument("--ptx", type=Path, help="folder to keep the PTX in")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled
    try:
        import triton
    except ImportError:
        print("benchmarks.ptx: triton is not installed (pip install triton)", file=sys.stderr)
        return 2
    from benchmarks import machine

    rows = []
    for sm in options.sm:
        for kernel, constants, warps in kernels(options.head_size):
            row = compiled(kernel, constants, warps, sm, options.ptx)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    result = machine.describe("cpu") | {"kernels": rows, "wkv7_counts": counts(options.head_size)}
    result["versions"]["triton"] = triton.__version__
    print("  ".join(f"{name} {value}" for name, value in result["wkv7_counts"].items()))
    machine.write(options.out, "ptx", result)
    return 0


def counts(N: int) -> dict[str, Any]:
    """Bytes and floating point operations of wkv7 forward and backward at B 8, T 4096, width 4096,
    bf16: what the kernels move and compute, beside the least that any must move.

    Each tensor counts once per kernel that reads or writes it; the two sequential kernels read what
    belongs to the keys once for each block of values, of which a cache may serve all but the first.
    """
    from rwkvtune.kernels.triton_gpu import CHUNK_LEN as n
    from rwkvtune.kernels.triton_gpu import VALUES_PER_PROGRAM

    heads, tokens = 4096 // N, 8 * 4096
    tensor = 2 * tokens * 4096  # bytes of one bf16 input
    square = 4 * tokens // n * heads * n * n  # the inverses, fp32
    states = 2 * tokens // n * heads * N * N  # bf16
    blocks = max(1, N // VALUES_PER_PROGRAM)
    invert = 3 * tensor + square
    forward = (5 * blocks + 2) * tensor + blocks * square + states
    state_gradient = (4 * blocks + 1) * tensor + blocks * square + states
    backward = 13 * tensor + square + 2 * states
    product = 2 * n * n * N
    flop = {
        "invert": product + 2 * n**3,
        "forward": blocks * 3 * product + 3 * product + product + 4 * 2 * n * N * N,
        "state_gradient": blocks * product + 2 * product + 3 * 2 * n * N * N,
        "backward": 19 * product + 7 * 2 * n * N * N,
    }
    return {
        "least_gb": round(20 * tensor / 1e9, 2),
        "moved_gb": round((invert + forward + state_gradient + backward) / 1e9, 2),
        "of_which_states_gb": round(4 * states / 1e9, 2),
        "tflop": round(sum(flop.values()) * tokens // n * heads / 1e12, 3),
    }


def kernels(head_size: int) -> list[tuple[Any, dict[str, Any], int]]:
    """Each kernel with its constants in a bf16 training step, and its warps."""
    from rwkvtune.kernels import triton_gpu as shared
    from rwkvtune.kernels.fused import triton_gpu as fused
    from rwkvtune.kernels.wkv6 import triton_gpu as wkv6
    from rwkvtune.kernels.wkv7 import triton_gpu as wkv7

    chunk = {"N": head_size, "n": shared.CHUNK_LEN, "HAS_RESET": False}
    forward = {"HAS_STATE": False, "IDENTITY": False, "WRITE_Y": True, "WRITE_STATES": True}
    backward = {"HAS_FINAL": True, "WRITE_STATES": True}
    values = {"VALUES": min(head_size, shared.VALUES_PER_PROGRAM)}
    precision = {"PRECISION": "tf32"}
    one = {"SHARED": False}
    head = {"N": head_size, "TOKENS": fused.TOKENS}
    shift = {"S": 6, "HAS_BEFORE": False, "HAS_RESET": False}
    shift |= {"TOKENS": fused.TOKENS, "WIDTH": fused.CHANNELS}
    block = {"BLOCK": fused.BLOCK}
    return [
        (wkv7._invert, chunk | precision, 4),
        (wkv7._forward, chunk | precision | values | forward, 4),
        (wkv7._state_gradient, chunk | precision | values | backward, 4),
        (wkv7._backward, chunk | precision, 8),
        (wkv6._scores, chunk | one, 4),
        (wkv6._forward, chunk | precision | values | one | forward, 4),
        (wkv6._state_gradient, chunk | precision | values | one | backward, 4),
        (wkv6._backward, chunk | precision | one, 4),
        (fused._shift, shift, 4),
        (fused._shift_backward, shift, 4),
        (fused._keys, head, 4),
        (fused._keys_backward, head, 4),
        (fused._bonus_gate, head, 4),
        (fused._bonus_gate_backward, head, 4),
        (fused._silu_gate, head, 4),
        (fused._silu_gate_backward, head, 4),
        (fused._squared_relu, block, 4),
        (fused._squared_relu_backward, block, 4),
        (fused._blend_value, block, 4),
        (fused._blend_value_backward, block, 4),
        (fused._softmax_gradient, block, 4),
    ]


def compiled(
    kernel: Any, constants: dict[str, Any], warps: int, sm: int, keep: Path | None
) -> dict[str, Any]:
    """One row: what a kernel takes on a device of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = TYPE_OF | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*bf16") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    name = f"{kernel.__module__.split('.')[-2]}{kernel.__name__}"
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}.sm_{sm}.ptx").write_text(binary.asm["ptx"])
    return {
        "kernel": name,
        "sm": sm,
        "warps": warps,
        **_usage(binary.asm["cubin"]),
        "shared_bytes": binary.metadata.shared,
    }


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes per thread, as NVIDIA's own tool reads them from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", told)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"]}


if __name__ == "__main__":
    sys.exit(main())
