"""Data for training runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import rwkvtune
from rwkvtune.data.text import build_from_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of token files with 12,000 characters of the bundled text in 4 documents; PREFIX_val
    has the last of them."""
    source = Path(rwkvtune.__file__).parent / "demo" / "tinyshakespeare.txt"
    characters = source.read_text(encoding="utf-8")
    documents = [characters[i : i + 3000] for i in range(0, 12000, 3000)]
    prefix = tmp_path_factory.mktemp("data") / "text"
    build_from_text(documents, prefix, "chars", val_share=0.25)
    return prefix
