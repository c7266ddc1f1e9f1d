"""Weights files of every spelling become the same model; other versions are refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rwkvtune
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import UserError
from rwkvtune.inference.load import load_model
from rwkvtune.models import (
    RWKV7Config,
    build_model,
    config_from_state_dict,
    detect_version,
    fill_model,
)

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def file(golden: Path) -> Weights:
    return load_file(golden / "x070-small.safetensors")


@pytest.fixture(scope="module")
def weights(file: Weights) -> Weights:
    return {name[2:]: w.float() for name, w in file.items() if name.startswith("w.")}


def as_plain_vectors(weights: Weights) -> Weights:
    return {n: w.reshape(-1) if w.shape[:2] == (1, 1) else w for n, w in weights.items()}


def without_unused(weights: Weights) -> Weights:
    return {n: w for n, w in weights.items() if not re.match(r"blocks\.0\.att\.v\d", n)}


def with_narrow_unused(weights: Weights) -> Weights:
    narrow = {"blocks.0.att.v1": torch.ones(64, 8), "blocks.0.att.v2": torch.ones(8, 64)}
    return weights | narrow


def of_a_sharded_run(weights: Weights) -> Weights:
    return {f"_forward_module.{n}": w for n, w in weights.items()}


def all_at_once(weights: Weights) -> Weights:
    return of_a_sharded_run(without_unused(as_plain_vectors(weights)))


def unchanged(weights: Weights) -> Weights:
    return dict(weights)


SPELLINGS = [
    unchanged, as_plain_vectors, without_unused, with_narrow_unused, of_a_sharded_run, all_at_once,
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_spelling_of_a_file_gives_the_original_programs_logits(
    tmp_path: Path, file: Weights, weights: Weights, spelling: Callable[[Weights], Weights],
    suffix: str,
) -> None:  # fmt: skip
    path = tmp_path / f"weights{suffix}"
    save_weights(path, spelling(weights))
    model = rwkvtune.load(path)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        logits, _ = model(file["idx"])
    assert (logits - file["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_state_dict_loads_by_the_three_public_lines(
    file: Weights, weights: Weights, spelling: Callable[[Weights], Weights]
) -> None:
    given = spelling(weights)
    kept = dict(given)
    model = build_model(config_from_state_dict(given))
    model.load_state_dict(given)
    assert given.keys() == kept.keys() and all(given[n] is kept[n] for n in kept)
    with torch.no_grad():
        logits, _ = model(file["idx"])
    assert (logits - file["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_of_every_precision_load_as_fp32_without_another_rounding(
    tmp_path: Path, weights: Weights, dtype: torch.dtype
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({n: w.to(dtype) for n, w in weights.items()}, path)
    model = rwkvtune.load(path)
    for name, parameter in model.state_dict().items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name].to(dtype).float()), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_in_bf16_computes_as_training_in_bf16_does(
    tmp_path: Path, file: Weights, weights: Weights, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    save_weights(path, weights)
    model = load_model(path, dtype=torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"emb.weight", "ln_out.weight", "blocks.1.att.r_k", "blocks.1.att.w0"} <= kept
    assert not kept & {"head.weight", "blocks.0.att.key.weight", "blocks.1.att.g2"}
    with torch.no_grad():
        logits, _ = model(file["idx"])
        with torch.autocast("cpu", torch.bfloat16):
            trained, _ = rwkvtune.load(path)(file["idx"])
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, trained)


def test_matrices_with_many_outputs_lie_in_memory_as_one_token_wants_them(
    tmp_path: Path, weights: Weights
) -> None:
    save_weights(tmp_path / "w.pth", weights)
    model = rwkvtune.load(tmp_path / "w.pth")
    by_columns = {n for n, p in model.named_parameters() if p.dim() == 2 and p.T.is_contiguous()}
    assert {"blocks.0.att.output.weight", "blocks.1.ffn.key.weight"} <= by_columns
    assert not by_columns & {"emb.weight", "blocks.1.ffn.value.weight", "blocks.1.att.w1"}
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())


def test_what_a_model_saves_has_the_original_names_order_and_shapes(
    tmp_path: Path, weights: Weights
) -> None:
    path = tmp_path / "rwkv-0.pth"
    model = build_model(config_from_state_dict(weights))
    fill_model(model, all_at_once(weights), "a file")
    save_weights(path, model.state_dict())
    saved = torch.load(path, weights_only=True)
    # safetensors sorts names; the file of initial values has the original order.
    assert sorted(saved) == sorted(weights)
    assert {n: w.shape for n, w in saved.items()} == {n: w.shape for n, w in weights.items()}
    unused = {f"blocks.0.att.v{i}" for i in range(3)}
    assert all(torch.equal(saved[n], weights[n]) for n in weights.keys() - unused)


def test_one_layer_without_its_unused_parameters_loads(tmp_path: Path, weights: Weights) -> None:
    one = {n: w for n, w in without_unused(weights).items() if not n.startswith("blocks.1.")}
    save_weights(tmp_path / "one.pth", one)
    model = rwkvtune.load(tmp_path / "one.pth")
    assert model.config.n_layer == 1
    assert all(w.isfinite().all() for w in model.state_dict().values())
    assert model(torch.tensor([[1, 2, 3]]))[0].shape == (1, 3, 31)


def test_every_dimension_is_read_from_the_tensors() -> None:
    shapes = {
        "emb.weight": (50, 96),
        "head.weight": (50, 96),
        "blocks.0.att.x_r": (96,),
        "blocks.0.att.w0": (96,),
        "blocks.0.att.r_k": (3, 32),
        "blocks.0.ffn.key.weight": (200, 96),
        "blocks.1.att.w1": (96, 5),
        "blocks.1.att.a1": (96, 7),
        "blocks.1.att.v1": (96, 3),
        "blocks.1.att.g1": (96, 9),
    }
    config = config_from_state_dict({n: torch.empty(s) for n, s in shapes.items()})
    assert isinstance(config, RWKV7Config)
    assert (config.vocab_size, config.n_layer, config.n_embd, config.head_size) == (50, 2, 96, 32)
    assert (config.dim_ffn, config.decay_rank, config.a_rank) == (200, 5, 7)
    assert (config.v_rank, config.g_rank, config.version) == (3, 9, "x070")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # Keys that RWKV-LM's classes of these versions have and the others have not.
        (["att.time_maa_x", "att.gate_w1", "att.time_faaaa"], "RWKV-6 x060a"),
        (["att.time_maa_x", "att.time_maa_rkvw_w1", "att.time_faaaa"], "RWKV-6 x060b or x060c"),
        (["att.time_maa_x", "att.time_faaaa", "att.time_state"], "RWKV-6 x060 with a tuned state"),
        (["att.time_state"], "a tuned state without its model"),
        (["att.time_decay", "att.time_first", "att.time_mix_k"], "RWKV-4"),
        (["att.time_decay", "att.time_first", "att.ln_x.weight"], "RWKV-5.0 or 5.1"),
        (["att.time_faaaa", "att.gate.weight", "att.time_mix_k"], "RWKV-5.0 and 5.1 are not"),
        (["att.x_r", "att.w0", "att.r_k", "ffn.s_emb.weight"], "x070a or later"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "_forward_module."])
def test_versions_that_are_not_trained_are_refused_by_name(
    names: list[str], message: str, prefix: str
) -> None:
    weights = {f"blocks.0.{n}": torch.zeros(1) for n in names} | {"emb.weight": torch.zeros(2, 2)}
    with pytest.raises(UserError, match=message) as caught:
        config_from_state_dict({prefix + n: w for n, w in weights.items()})
    assert "x052 (RWKV-5.2)" in str(caught.value)


@pytest.mark.parametrize("file", ["x052", "x060", "x070", "x070-v5tree"])
def test_every_version_is_recognised_by_its_original_names(golden: Path, file: str) -> None:
    names = json.loads((golden / "optimizer_groups.json").read_text())[file]["shapes"]
    assert detect_version(names) == file[:4]


@pytest.mark.parametrize("spelling", [as_plain_vectors, of_a_sharded_run, all_at_once])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("version", ["x052", "x060"])
def test_older_versions_load_in_any_spelling_and_precision(
    golden: Path, tmp_path: Path, version: str, dtype: torch.dtype,
    spelling: Callable[[Weights], Weights],
) -> None:  # fmt: skip
    file = load_file(golden / f"{version}-small.safetensors")
    weights = {n[2:]: w.to(dtype) for n, w in file.items() if n.startswith("w.")}
    torch.save(spelling(weights), tmp_path / "weights.pth")
    model = rwkvtune.load(tmp_path / "weights.pth")
    assert model.config.version == version
    assert all(torch.equal(p, weights[n].float()) for n, p in model.state_dict().items())
    with torch.no_grad():
        logits, _ = model(file["idx"])
    # The golden weights are exact in fp16, but not in bf16.
    assert (logits - file["logits"]).abs().max() < (2e-5 if dtype != torch.bfloat16 else 0.1)


@pytest.mark.parametrize(
    ("names", "found"),
    [([], "no tensors at all"), (["layer.0.weight", "bias"], "bias, layer.0.weight")],
)
def test_what_is_no_rwkv_at_all_is_refused_with_what_it_holds(names: list[str], found: str) -> None:
    with pytest.raises(UserError, match=f"no RWKV that rwkvtune knows.*{found}"):
        config_from_state_dict({n: torch.zeros(1) for n in names})


@pytest.mark.parametrize(
    "missing",
    [
        "emb.weight", "head.weight", "ln_out.weight", "blocks.0.ln0.weight", "blocks.0.att.r_k",
        "blocks.0.ffn.key.weight", "blocks.1.att.v1", "blocks.1.att.w1", "blocks.1.att.x_g",
        "blocks.1.ffn.value.weight",
    ],
)  # fmt: skip
def test_a_file_without_a_tensor_is_refused_with_its_name(
    tmp_path: Path, weights: Weights, missing: str
) -> None:
    path = tmp_path / "weights.pth"
    save_weights(path, {n: w for n, w in weights.items() if n != missing})
    with pytest.raises(UserError) as caught:
        rwkvtune.load(path)
    message = str(caught.value)
    assert "\n" not in message
    # Without r_k these weights are no x070 at all.
    assert missing in message or missing == "blocks.0.att.r_k"


def test_a_file_that_lost_half_of_its_tensors_is_refused_in_one_short_line(
    tmp_path: Path, weights: Weights
) -> None:
    path = tmp_path / "weights.pth"
    save_weights(path, {n: w for n, w in weights.items() if not n.startswith("blocks.1.ffn")})
    with pytest.raises(UserError, match="weights.pth does not fit an x070 model.*blocks.1.ffn"):
        rwkvtune.load(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("blocks.1.att.key.weight", torch.zeros(64, 63)),
        ("blocks.1.att.value.weight", torch.zeros(64, 64, dtype=torch.int8)),
        ("blocks.1.ffn.x_k", torch.zeros(1, 1, 65)),
        ("blocks.0.att.r_k", torch.zeros(64)),
        ("blocks.0.att.time_state", torch.zeros(1, 64, 64)),
        ("blocks.x.att.key.weight", torch.zeros(64, 64)),
        ("blocks.3.ln1.bias", torch.zeros(64)),
    ],
)
def test_a_tensor_of_another_shape_or_an_unknown_one_is_refused_with_its_name(
    weights: Weights, name: str, tensor: Tensor
) -> None:
    given = weights | {name: tensor}
    with pytest.raises(UserError, match=re.escape(name.rsplit(".", 2)[0])):
        fill_model(build_model(config_from_state_dict(given)), given, "a file")


def test_a_file_of_another_version_is_refused_before_it_is_read_as_a_model(tmp_path: Path) -> None:
    path = tmp_path / "rwkv4.pth"
    save_weights(path, {"blocks.0.att.time_first": torch.zeros(4), "emb.weight": torch.zeros(2, 4)})
    assert load_weights(path).keys() == {"blocks.0.att.time_first", "emb.weight"}
    with pytest.raises(UserError, match="RWKV-4"):
        rwkvtune.load(path)
