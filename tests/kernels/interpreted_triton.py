"""Triton's kernels on CPU tensors, through Triton's interpreter."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def interpreted(module: str) -> ModuleType:
    """The module of that name with its kernels interpreted; skips where there is no Triton, and
    where there is a GPU: tests/test_gpu.py then runs the kernels themselves."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("with a GPU, Triton compiles", allow_module_level=True)
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module(module)
