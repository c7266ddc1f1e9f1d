"""What each config.py says about a model, against the original programs' numbers and our models."""

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

from rwkvtune.models import CONFIG_CLASSES, CONFIGS, build_model, config_from_shapes
from rwkvtune.models.dimensions import INITIAL_VALUE_TERMS
from rwkvtune.models.rwkv7.config import UNUSED

C, N, L = 128, 64, 3  # of the golden files


@pytest.fixture(params=CONFIGS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def original(golden: Path, version: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / f"init-{version}.json").read_text())
    return content


def evaluated(formula: str, layer: int, rows: int = 1, columns: int = 1) -> Any:
    """The value of a formula of TENSORS, in fp64; orth(g) gives g."""
    i = np.arange(C)
    terms = {
        "C": C, "N": N, "L": L, "l": layer, "i": i, "d": i / C, "n": i / (C - 1), "rows": rows,
        "columns": columns, "r0": layer / (L - 1), "r1": 1 - layer / L,
        "z": (i % N - (N - 1) / 2) / ((N - 1) / 2),
        "orth": float, "sqrt": math.sqrt, "max": max, "abs": abs,
    }  # fmt: skip
    return eval(formula.replace("^", "**"), {"__builtins__": {}}, terms)


def formula_of(version: str, name: str) -> str:
    tensors = CONFIGS[version].TENSORS
    parts = name.split(".")
    any_layer = ".".join(["blocks", "*", *parts[2:]])
    return str(tensors[name if name in tensors else any_layer][1])


def layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else 0


def test_names_and_shapes_are_the_original_programs(version: str, original: dict[str, Any]) -> None:
    shapes = CONFIGS[version].tensor_shapes(CONFIG_CLASSES[version](97, L, C))
    assert shapes == {name: tuple(shape) for name, shape in original["shapes"].items()}


def test_formulas_give_the_original_programs_initial_values(
    golden: Path, version: str, original: dict[str, Any]
) -> None:
    exact = load_file(golden / f"init-{version}.safetensors")
    seen = set()
    for name in original["order"]:
        rows, columns = (original["shapes"][name] + [1])[:2]
        formula = formula_of(version, name)
        if name in original["random"]:
            wanted = original["random"][name]
            if formula.startswith("uniform"):
                bound = float(formula.removesuffix(")").split(", ")[1])
                assert 0.99 * bound < wanted["absmax"] <= bound, name
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
    assert seen == {formula for _, formula in CONFIGS[version].TENSORS.values()}
    assert CONFIGS[version].INITIAL_VALUE_TERMS == INITIAL_VALUE_TERMS


widths = st.integers(1, 40)


RANKS = {
    "x052": (),
    "x060": ("mix_rank", "decay_rank"),
    "x070": ("decay_rank", "a_rank", "v_rank", "g_rank"),
}


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(list(CONFIGS)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 8, 32])),
    st.tuples(*[widths] * 6),
)
def test_shapes_and_counts_are_those_of_a_model_and_give_its_dimensions_back(
    version: str, sizes: tuple[int, int, int], others: tuple[int, ...]
) -> None:
    n_layer, num_heads, head_size = sizes
    vocab_size, dim_ffn, *ranks = others
    config = CONFIG_CLASSES[version](
        vocab_size, n_layer, num_heads * head_size, head_size,
        dim_ffn=dim_ffn, **dict(zip(RANKS[version], ranks, strict=False)),
    )  # fmt: skip
    model = build_model(config, initial_values=False)
    shapes = CONFIGS[version].tensor_shapes(config)
    assert shapes == {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == config.num_parameters
    assert config_from_shapes(shapes) == config
    if n_layer > 1:
        used = {name: shape for name, shape in shapes.items() if name not in UNUSED}
        assert config_from_shapes(used) == config
