"""The command line itself: help without torch, unknown commands, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkvtune import __version__
from rwkvtune.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "lightning_fabric", "numpy", "matplotlib"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from rwkvtune.cli.main import main
for args in ARGUMENTS:
    try:
        code = main(args)
    except SystemExit as end:
        code = end.code
    assert code == 0, (args, code)
"""


def test_help_of_everything_needs_no_torch() -> None:
    arguments = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    arguments.append(["train", "--data_file", "x", "--print_config"])
    code = WITHOUT_TORCH.replace("ARGUMENTS", repr(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: rwkvtune {name}" in done.stdout


def test_help_names_every_command_and_no_command_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    helped = capsys.readouterr().out
    assert all(f"  {name}" in helped for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().out == helped
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rwkvtune {__version__}\n"


def test_an_unknown_command_is_one_line_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean train?\n"
    assert main(["xyzzy"]) == 2
    assert f"there are {', '.join(COMMANDS)}" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_a_command_without_a_word() -> None:
    command = [sys.executable, "-m", "rwkvtune", "data", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
