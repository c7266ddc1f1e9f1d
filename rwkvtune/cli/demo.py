"""`rwkvtune demo`: a small RWKV-7 trained on a bundled text, on a laptop CPU, in minutes."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rwkvtune demo", description=__doc__.partition(": ")[2], allow_abbrev=False
    )
    parser.add_argument(
        "--proj_dir",
        type=Path,
        default=Path("out/demo"),
        help="the run folder (default: %(default)s)",
    )
    folder: Path = parser.parse_args(argv).proj_dir
    from rwkvtune.demo.run import run_demo

    return run_demo(folder)
