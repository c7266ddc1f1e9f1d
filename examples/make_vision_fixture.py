"""Small files of the true formats for the published vision command: python
examples/make_vision_fixture.py FOLDER."""

from rwkvtune.cli.main import run_door

if __name__ == "__main__":
    raise SystemExit(run_door("vision_fixture"))
