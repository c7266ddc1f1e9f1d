"""What every test may use: the golden folder, token files, and the skipping of GPU tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Several workers share the cores (pytest-xdist); threads that wait for each other would cost more.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton asks for this when it is imported, by whomever; its kernels then run on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of small files made by other programs; tests/golden/README.md tells their origin."""
    return GOLDEN


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of token files with 12,000 characters of the bundled text in 4 documents; PREFIX_val
    has the last of them."""
    import rwkvtune
    from tests.token_files import write_token_files

    source = Path(rwkvtune.__file__).parent / "demo" / "tinyshakespeare.txt"
    characters = source.read_text(encoding="utf-8")
    documents = [characters[i : i + 3000] for i in range(0, 12000, 3000)]
    prefix = tmp_path_factory.mktemp("data") / "text"
    write_token_files(documents, prefix, "chars", val_share=0.25)
    return prefix


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees none; torch is loaded only when there are such."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
