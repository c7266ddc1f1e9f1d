"""Tiny checkpoints for trying train_alternating.py: python make_alternating_checkpoints.py DIR."""

from rwkvtune.cli.main import run_door

if __name__ == "__main__":
    raise SystemExit(run_door("alternating_checkpoints"))
