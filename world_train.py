"""WorldRWKV's world_train.py: its published flags work as printed (see docs/vision.md)."""

from rwkvtune.cli.main import run_door

if __name__ == "__main__":
    raise SystemExit(run_door("world_train"))
