"""Learn the headings of a simulated flock of particles; docs/sequences.md tells about it."""

from rwkvtune.pipeline.vicsek import main

if __name__ == "__main__":
    raise SystemExit(main())
