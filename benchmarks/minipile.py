"""A run's train_log.txt beside RWKV-LM's twelve published losses on MiniPile.

    python -m benchmarks.minipile out/my-run/train_log.txt

The published run is L12 D768 V65536, ctx 512, 16 rows, 6e-4 to 6e-5, weight decay 0.001, bf16; a
line of the log is a mini-epoch of 40320 rows, and each must be within 0.01 of its published loss.
Exit code 0: all twelve are there and agree; 1: they do not, or not all are there yet.
docs/from-rwkv-lm.md has the commands; the data set is 3 GB and is not part of this repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PUBLISHED = (
    4.875856, 4.028621, 3.801625, 3.663070, 3.578974, 3.510906,
    3.462345, 3.412196, 3.376724, 3.336911, 3.313411, 3.295895,
)  # fmt: skip
"""Mean losses of mini-epochs 0 to 11. Source: RWKV-LM, RWKV-v7/train_temp/README.md, 524481d."""
TOLERANCE = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("log", type=Path, help="train_log.txt, or the run folder that holds it")
    path = parser.parse_args().log
    if path.is_dir():
        path = path / "train_log.txt"
    try:
        losses = read_losses(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {path} cannot be read: {error}", file=sys.stderr)
        return 2
    if not losses:
        print(
            f"error: {path} has no line of a mini-epoch: number, loss, its exponential, learning "
            "rate, date, time, number",
            file=sys.stderr,
        )
        return 2
    return compare(losses)


def read_losses(log: str) -> dict[int, float]:
    """Mini-epoch -> mean loss; of an epoch that was run again after a stop, the later line."""
    losses = {}
    for line in log.splitlines():
        words = line.split()
        if len(words) != 7 or not words[0].isdigit():
            continue  # the header of a run
        try:
            losses[int(words[0])] = float(words[1])
        except ValueError:
            continue
    return losses


def compare(losses: dict[int, float]) -> int:
    print("mini-epoch  published      found  difference")
    wrong, missing = [], []
    for epoch, published in enumerate(PUBLISHED):
        if epoch not in losses:
            missing.append(epoch)
            continue
        away = losses[epoch] - published
        agrees = abs(away) <= TOLERANCE + 1e-9
        if not agrees:
            wrong.append(epoch)
        mark = "" if agrees else "  more than 0.01 away"
        print(f"{epoch:10d}  {published:9.6f}  {losses[epoch]:9.6f}  {away:+10.6f}{mark}")
    if missing:
        print(f"not in the log yet: mini-epochs {', '.join(map(str, missing))}")
    if not wrong and not missing:
        print("all twelve losses agree within 0.01")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
