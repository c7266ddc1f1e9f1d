"""Sequence training under the names that rwkv_trainer published; see docs/sequences.md."""

from rwkvtune.pipeline import *  # noqa: F403
from rwkvtune.pipeline import __all__, __version__  # noqa: F401
