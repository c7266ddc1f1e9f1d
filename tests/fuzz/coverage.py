"""`python -m tests.fuzz.coverage TARGET CASES`: one binary reader under atheris, which looks for
inputs that reach new lines of it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["rwkvtune"]):
    from tests.fuzz.guard import guarded
    from tests.fuzz.targets import all_targets, read_changed


def main() -> None:
    name, cases = sys.argv[1:]
    scratch = Path(tempfile.mkdtemp(prefix="rwkvtune-fuzz-"))
    target, corpus = all_targets(scratch)[name], scratch / "corpus"
    corpus.mkdir()
    for number, content in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(content)

    def one(content: bytes) -> None:
        with guarded():
            read_changed(target, content, scratch / "case")

    options = [f"-runs={cases}", "-verbosity=0", "-timeout=0", "-rss_limit_mb=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
