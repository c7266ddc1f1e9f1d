"""`python examples/make_vision_fixture.py FOLDER`: files for the published vision command."""

from __future__ import annotations

from pathlib import Path

from rwkvtune.cli.arguments import OneLineParser

ABOUT = """Write a tiny x070 model, a tiny SigLIP encoder and a LLaVA-format data set under the
names that the published vision command uses; run that command inside FOLDER."""


def main(argv: list[str]) -> int:
    parser = OneLineParser("make_vision_fixture.py", ABOUT)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new or existing")
    parser.add_argument("--samples", type=int, default=48, metavar="N", help="records (48)")
    args = parser.parse_args(argv)
    from rwkvtune.demo.vision_fixture import DATA, ENCODER, MODEL, write_fixture

    write_fixture(args.folder, samples=args.samples)
    for name in (MODEL, ENCODER, DATA):
        print(f"wrote {args.folder / name}")
    return 0
