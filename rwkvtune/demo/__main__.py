"""`python -m rwkvtune.demo`: the same as `rwkvtune demo`."""

from __future__ import annotations

import sys

from rwkvtune.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
