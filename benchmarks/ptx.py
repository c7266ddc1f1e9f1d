"""The Triton kernels compiled for GPUs that need not be there: registers, spills, shared memory.

    python -m benchmarks.ptx [--sm 80 90] [--head_size 64] [--ptx FOLDER] [--out benchmarks/results]
    python -m benchmarks.ptx --variants [--amd gfx942] [--only fused_shift]

Compiles the recurrences of x070 and x060 and the fused pieces around them as a bf16 training step
calls them, and prints what each kernel takes on the device. A spill is bytes per thread that did
not fit into registers. Needs triton, not a GPU: triton brings NVIDIA's assembler along.
--variants compiles them in every other way that a call can ask for, and writes no file: it shows
what Triton's interpreter, which takes more than the compiler, cannot.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

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
    parser.add_argument("--amd", nargs="*", default=[], help="AMD architectures, such as gfx942")
    parser.add_argument("--variants", action="store_true", help="all other ways to call them")
    parser.add_argument("--only", nargs="+", help="these kernels, such as wkv7_forward")
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
    from triton.backends.compiler import GPUTarget

    from benchmarks import machine

    targets = [GPUTarget("cuda", sm, 32) for sm in options.sm]
    targets += [GPUTarget("hip", architecture, 64) for architecture in options.amd]
    rows = []
    for target in targets:
        capability = target.arch if target.backend == "cuda" else 0
        for way in (variants if options.variants else usual)(options.head_size, capability):
            if options.only and name_of(way.kernel) not in options.only:
                continue
            row = compiled(way, target, options.ptx)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    if options.variants or options.only or options.amd:
        return 0
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
    (One block on an H100 or H200. What the last kernel reads a second time is in a cache.)
    """
    from rwkvtune.kernels.triton_gpu import CHUNK_LEN as n
    from rwkvtune.kernels.triton_gpu import values_per_program

    heads, tokens = 4096 // N, 8 * 4096
    tensor = 2 * tokens * 4096  # bytes of one bf16 input
    square = 4 * tokens // n * heads * n * n  # the inverses, fp32
    states = 2 * tokens // n * heads * N * N  # bf16
    blocks = N // values_per_program(N, 90)
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


class Way(NamedTuple):
    """A kernel as it is called: its constants, its warps, and what its 16-bit tensors are."""

    kernel: Any
    constants: dict[str, Any]
    warps: int = 4
    variant: str = "usual"
    inputs: str = "*bf16"


def name_of(kernel: Any) -> str:
    return f"{kernel.__module__.split('.')[-2]}{kernel.__name__}"


def variants(head_size: int, capability: int) -> list[Way]:
    """Everything that changes one thing about a usual way."""
    changes: dict[str, dict[str, Any]] = {
        "reset": {"HAS_RESET": True},
        "before": {"HAS_BEFORE": True},
        "state": {"HAS_STATE": True},
        "identity": {"IDENTITY": True, "WRITE_Y": False, "WRITE_STATES": False},
        "no state's gradient": {"HAS_FINAL": False, "WRITE_STATES": False},
        "one decay for all": {"SHARED": True},
        "high precision": {"PRECISION": "tf32x3"},
        "ieee": {"PRECISION": "ieee"},
        "chunk_len 32": {"n": 32},
        "one share": {"S": 1},
        "two shares": {"S": 2},
    }
    found = []
    for way in usual(head_size, capability):
        for label, change in changes.items():
            # Not a kernel that lacks the constant; and chunks of x060 have one length.
            has_it = change.keys() <= way.constants.keys()
            if has_it and not ("n" in change and name_of(way.kernel).startswith("wkv6")):
                found.append(way._replace(constants=way.constants | change, variant=label))
        found.append(way._replace(variant="fp16", inputs="*fp16"))
        exact = {"PRECISION": "tf32x3"} if "PRECISION" in way.constants else {}
        found.append(way._replace(constants=way.constants | exact, variant="fp32", inputs="*fp32"))
    return found


def usual(head_size: int, capability: int) -> list[Way]:
    """Each kernel as a bf16 training step calls it."""
    from rwkvtune.kernels import triton_gpu as shared
    from rwkvtune.kernels.fused import triton_gpu as fused
    from rwkvtune.kernels.wkv6 import triton_gpu as wkv6
    from rwkvtune.kernels.wkv7 import triton_gpu as wkv7

    chunk = {"N": head_size, "n": shared.CHUNK_LEN, "HAS_RESET": False}
    forward = {"HAS_STATE": False, "IDENTITY": False, "WRITE_Y": True, "WRITE_STATES": True}
    backward = {"HAS_FINAL": True, "WRITE_STATES": True}
    values = {"VALUES": shared.values_per_program(head_size, capability)}
    at_end = wkv7.backward_options(head_size, "tf32")
    warps = at_end.pop("num_warps")
    precision = {"PRECISION": "tf32"}
    one = {"SHARED": False}
    head = {"N": head_size, "TOKENS": fused.TOKENS}
    shift = {"S": 6, "HAS_BEFORE": False, "HAS_RESET": False}
    shift |= {"TOKENS": fused.TOKENS, "WIDTH": fused.CHANNELS}
    block = {"BLOCK": fused.BLOCK}
    return [
        Way(wkv7._invert, chunk | precision, 1),
        Way(wkv7._forward, chunk | precision | values | forward),
        Way(wkv7._state_gradient, chunk | precision | values | backward),
        Way(wkv7._backward, chunk | precision | at_end, warps),
        Way(wkv6._scores, chunk | one),
        Way(wkv6._forward, chunk | precision | values | one | forward),
        Way(wkv6._state_gradient, chunk | precision | values | one | backward),
        Way(wkv6._backward, chunk | precision | one, warps),
        Way(fused._shift, shift),
        Way(fused._shift_backward, shift),
        Way(fused._keys, head),
        Way(fused._keys_backward, head),
        Way(fused._bonus_gate, head),
        Way(fused._bonus_gate_backward, head),
        Way(fused._silu_gate, head),
        Way(fused._silu_gate_backward, head),
        Way(fused._squared_relu, block),
        Way(fused._squared_relu_backward, block),
        Way(fused._blend_value, block),
        Way(fused._blend_value_backward, block),
        Way(fused._softmax_gradient, block),
    ]


def compiled(way: Way, target: Any, keep: Path | None) -> dict[str, Any]:
    """One row: what a kernel takes on a device of this kind."""
    import triton
    from triton.compiler import ASTSource

    names = way.kernel.arg_names
    types = TYPE_OF | dict.fromkeys(way.constants, "constexpr")
    signature = {name: types.get(name, way.inputs) for name in names}
    source = ASTSource(
        fn=way.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in way.constants.items()},
        # As a launch finds them: torch's memory begins at multiples of 512 bytes, and widths are
        # multiples of a head size.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or name in ("C", "V", "size")
        },
    )
    binary = triton.compile(source, target=target, options={"num_warps": way.warps})
    name = name_of(way.kernel)
    is_nvidia = target.backend == "cuda"
    if keep is not None and is_nvidia:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}.sm_{target.arch}.ptx").write_text(binary.asm["ptx"])
    row = {"kernel": name, "sm": target.arch, "warps": way.warps}
    if way.variant != "usual":
        row["variant"] = way.variant
    if is_nvidia:
        row |= _usage(binary.asm["cubin"])
    return row | {"shared_bytes": binary.metadata.shared}


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
