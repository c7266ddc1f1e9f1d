"""`python3 convert_chat_json_to_jsonl.py IN.json OUT.jsonl`: LLaVA's array as a record per line."""

from __future__ import annotations

import sys
from pathlib import Path

from rwkvtune.errors import UserError

USAGE = """usage: convert_chat_json_to_jsonl.py IN.json OUT.jsonl [--check-images [DIR]]

Writes each record of a JSON array (or of an object that holds one) as one line of UTF-8, in the
same order. OUT appears only when it is whole. --check-images counts the pictures that are in none
of DIR, DIR/images, DIR/data and DIR/images.zip; without DIR it looks beside IN."""


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    files, folder = _parsed(argv)
    if len(files) != 2:
        print(USAGE, file=sys.stderr)
        return 1  # as published, and so for a missing file
    source, target = map(Path, files)
    if not source.is_file():
        print(f"error: {source}: there is no such file\n{USAGE}", file=sys.stderr)
        return 1
    pictures_in = source.parent if folder == Path() else folder
    if pictures_in is not None and not pictures_in.is_dir():
        raise UserError(f"--check-images {pictures_in}: there is no such folder")
    from rwkvtune.data.llava import convert_to_lines

    result = convert_to_lines(source, target, pictures_in=pictures_in)
    print(f"{result.records:,} records from {source} to {target}")
    if pictures_in is not None:
        print(f"{result.pictures:,} pictures, {result.missing:,} of them not in {pictures_in}")
        for name in result.first_missing:
            print(f"  missing: {name}")
        if result.missing > len(result.first_missing):
            print(f"  and {result.missing - len(result.first_missing):,} more")
    return 0


def _parsed(argv: list[str]) -> tuple[list[str], Path | None]:
    """(the files, the folder of --check-images: None = not asked for, Path() = beside the source).

    Only what follows the two files may be the flag's folder.
    """
    files: list[str] = []
    folder: Path | None = None
    for arg in argv:
        name, equals, value = arg.partition("=")
        if name == "--check-images":
            folder = Path(value) if equals else Path()
        elif arg.startswith("--"):
            raise UserError(f"unknown flag {arg}: there is --check-images [DIR]")
        elif folder == Path() and len(files) == 2:
            folder = Path(arg)
        else:
            files.append(arg)
    return files, folder
