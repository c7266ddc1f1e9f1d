"""RWKV-LM's train.py: its published flags work as printed (`python train.py --help`)."""

from rwkvtune.cli.main import run_door

if __name__ == "__main__":
    raise SystemExit(run_door("published_flags"))
