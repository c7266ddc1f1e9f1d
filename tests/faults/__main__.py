"""`python -m tests.faults [CASE ...]`: do to runs what can happen to them, and print the table."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import rwkvtune
from tests.faults.cases import FULL, Bench
from tests.token_files import write_token_files


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in FULL]
    if unknown:
        print(f"error: no case {unknown[0]}; there are {', '.join(FULL)}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rwkvtune-faults-") as folder:
        source = Path(rwkvtune.__file__).parent / "demo" / "tinyshakespeare.txt"
        text = source.read_text(encoding="utf-8")
        prefix = Path(folder) / "text"
        write_token_files([text[i : i + 3000] for i in range(0, 12000, 3000)], prefix, "chars")
        bench = Bench(prefix, Path(folder))
        columns = "{:<44}{:>6}{:>10}{:>20}"
        print(columns.format("fault", "tried", "survived", "steps lost at most"), flush=True)
        survived_all = True
        for name in names or FULL:
            row = FULL[name](bench)
            print(columns.format(*dataclasses.astuple(row)), flush=True)
            survived_all = survived_all and row.survived == row.tried
    print(f"{time.monotonic() - begin:.0f} s; a state was saved every 3 steps")
    return 0 if survived_all else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
