#!/bin/sh
# Train a model by its preset:
#
#   bash examples/train_with_config.sh 0.1b                      try the path on a tiny random model
#   DATA=my.jsonl bash examples/train_with_config.sh 0.1b        train the released weights
#   DATA=data/my WEIGHTS=my.pth bash examples/train_with_config.sh 0.1b --epoch_count 2
#
# DATA: text, or the prefix of token files.  WEIGHTS: a file; without it the preset's own is looked
# for.  Flags of `rwkvtune train` may follow.  docs/presets.md tells the rest.
set -eu
HERE=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if [ -x "$HERE/.venv/bin/python" ]; then PYTHON="$HERE/.venv/bin/python"; fi
fi
PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -c \
  'from rwkvtune.cli.main import run_door; raise SystemExit(run_door("train_with_config"))' "$@"
