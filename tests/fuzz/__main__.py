"""`python -m tests.fuzz [--cases N] [TARGET ...]`: read N changed files of all kinds together.

With atheris installed the binary readers are also fuzzed by coverage, for as many cases again.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.changes import changed
from tests.fuzz.guard import guarded, limit_memory
from tests.fuzz.targets import Target, all_targets, read_changed

BINARY = ("token index", "tokens", "weights", "pictures in a zip")
BATCH = 2000
"""Cases for one call of hypothesis, which remembers each."""


def fuzz(target: Target, folder: Path, cases: int, first_seed: int) -> tuple[int, int]:
    """(files taken, files refused); an exception that is not ours comes out with its example."""
    counts = [0, 0]
    for start in range(0, cases, BATCH):

        @seed(first_seed + start)
        @settings(
            max_examples=min(BATCH, cases - start),
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.deferred(lambda: changed(target.seeds)))
        def one(content: bytes) -> None:
            with guarded():
                counts[read_changed(target, content, folder)] += 1

        one()
    return counts[1], counts[0]


def fuzz_by_coverage(names: list[str], cases: int) -> None:
    """atheris ends its process, so each target has one of its own."""
    for name in names:
        done = subprocess.run([sys.executable, "-m", "tests.fuzz.coverage", name, str(cases)])
        if done.returncode:
            raise SystemExit(f"{name}: atheris found something, see above")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("targets", nargs="*")
    args = parser.parse_args()
    begin, first_seed = time.monotonic(), random.randrange(10**9)
    with tempfile.TemporaryDirectory(prefix="rwkvtune-fuzz-") as scratch:
        targets = all_targets(Path(scratch))
        chosen = args.targets or list(targets)
        each = args.cases / sum(targets[name].share for name in chosen)
        print(f"seed {first_seed}", flush=True)
        limit_memory()
        print(f"{'file':<40}{'cases':>8}{'read':>8}{'refused':>9}", flush=True)
        for name in chosen:
            folder = Path(scratch) / name.replace("/", "-")
            taken, refused = fuzz(
                targets[name], folder, math.ceil(each * targets[name].share), first_seed
            )
            print(f"{name:<40}{taken + refused:>8}{taken:>8}{refused:>9}", flush=True)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: the binary readers were not fuzzed by coverage")
    else:
        fuzz_by_coverage([name for name in chosen if name in BINARY], math.ceil(each))
    print(f"{time.monotonic() - begin:.0f} s: no crash, hang, foreign code or unbounded memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
