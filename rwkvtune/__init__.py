"""rwkvtune: train RWKV models. Importing it loads nothing heavy; see README.md for the map."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inference.load import load_model as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """`rwkvtune.load(path)`: a weights file as a model in eval mode; imports torch only then."""
    if name == "load":
        from .inference.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
