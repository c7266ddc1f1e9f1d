"""Check every preset: tensors, shapes and parameters, on the meta device; docs/presets.md."""

from rwkvtune.cli.main import run_door

if __name__ == "__main__":
    raise SystemExit(run_door("check_configs"))
