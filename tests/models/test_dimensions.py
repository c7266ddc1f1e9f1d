"""What config.py says about an x070 model, against the original program's numbers and our model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from rwkvtune.models import RWKV7Config, build_model, config_from_shapes
from rwkvtune.models.rwkv7.config import TENSORS, UNUSED, tensor_shapes

C, N, L = 128, 64, 3  # of the golden files


@pytest.fixture(scope="module")
def original(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "init-x070.json").read_text())
    return content


def evaluated(formula: str, layer: int, rows: int = 1, columns: int = 1) -> Any:
    """The value of a formula of TENSORS, in fp64; orth(g) gives g."""
    i = np.arange(C)
    terms = {
        "C": C, "N": N, "L": L, "l": layer, "d": i / C, "n": i / (C - 1), "rows": rows,
        "columns": columns, "r0": layer / (L - 1), "r1": 1 - layer / L,
        "z": (i % N - (N - 1) / 2) / ((N - 1) / 2),
        "orth": float, "sqrt": math.sqrt, "max": max, "abs": abs,
    }  # fmt: skip
    return eval(formula.replace("^", "**"), {"__builtins__": {}}, terms)


def formula_of(name: str) -> str:
    parts = name.split(".")
    any_layer = ".".join(["blocks", "*", *parts[2:]])
    return TENSORS[name if name in TENSORS else any_layer][1]


def layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else 0


def test_names_and_shapes_are_the_original_programs(original: dict[str, Any]) -> None:
    shapes = tensor_shapes(RWKV7Config(97, L, C))
    assert shapes == {name: tuple(shape) for name, shape in original["shapes"].items()}


def test_formulas_give_the_original_programs_initial_values(
    golden: Path, original: dict[str, Any]
) -> None:
    exact = load_file(golden / "init-x070.safetensors")
    seen = set()
    for name in original["order"]:
        rows, columns = (original["shapes"][name] + [1])[:2]
        formula = formula_of(name)
        if name in original["random"]:
            wanted = original["random"][name]
            if formula.startswith("uniform"):
                assert formula == "uniform(-1e-4, 1e-4)" and 0.99e-4 < wanted["absmax"] <= 1e-4
            else:
                gain = evaluated(formula, layer_of(name), rows, columns)
                assert formula.startswith("orth(")
                assert gain == pytest.approx(wanted["orthogonal_gain"], rel=1e-6), name
        else:
            constant = 0.0 if name in original["all_zero"] else 1.0
            wanted = exact.get(name, np.float32(constant)).reshape(-1)
            # The original takes some powers in fp32.
            np.testing.assert_allclose(
                np.broadcast_to(evaluated(formula, layer_of(name)), wanted.shape),
                wanted, rtol=1e-6, atol=2e-6, err_msg=name,
            )  # fmt: skip
        seen.add(formula)
    assert seen == {formula for _, formula in TENSORS.values()}


widths = st.integers(1, 40)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 8, 32]), st.tuples(*[widths] * 6))
def test_shapes_and_counts_are_those_of_a_model_and_give_its_dimensions_back(
    n_layer: int, num_heads: int, head_size: int, others: tuple[int, ...]
) -> None:
    vocab_size, dim_ffn, w, a, v, g = others
    config = RWKV7Config(
        vocab_size, n_layer, num_heads * head_size, head_size,
        dim_ffn=dim_ffn, decay_rank=w, a_rank=a, v_rank=v, g_rank=g,
    )  # fmt: skip
    model = build_model(config, initial_values=False)
    shapes = tensor_shapes(config)
    assert shapes == {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == config.num_parameters
    assert config_from_shapes(shapes) == config
    if n_layer > 1:
        used = {name: shape for name, shape in shapes.items() if name not in UNUSED}
        assert config_from_shapes(used) == config
