"""`python examples/make_alternating_checkpoints.py DIR`: to try train_alternating.py on."""

from __future__ import annotations

import sys
from pathlib import Path

from rwkvtune.cli.arguments import OneLineParser

ABOUT = """Write tiny checkpoints and data for the documented commands of train_alternating.py.

FOLDER is their /path/to, and the checkpoints lie in it under the names that the commands use. Run
the commands in FOLDER, or in the folder of --link."""


def main(argv: list[str]) -> int:
    parser = OneLineParser("make_alternating_checkpoints.py", ABOUT)
    parser.add_argument("folder", type=Path, help="where they go")
    parser.add_argument("--link", type=Path, metavar="DIR", help="link the checkpoints into DIR")
    args = parser.parse_args(argv)
    from rwkvtune.demo.alternating_checkpoints import NAMES, link, make  # torch: seconds

    make(args.folder)
    if args.link:
        link(args.folder, args.link)
    print(f"wrote {len(NAMES)} checkpoints, a vision tower and two manifests to {args.folder}")
    where = args.link or args.folder
    door = Path(sys.argv[0]).resolve().parent.parent / "train_alternating.py"
    print(f"With {args.folder.resolve()} in the place of /path/to, the commands run in {where}:")
    print(f"  cd {where} && python {door} --model_name_or_path {next(iter(NAMES))} --dry_run")
    return 0
