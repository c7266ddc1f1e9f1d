"""Quantized bases against bitsandbytes' own unpacking and plain torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvtune.adapters.quant import QuantizedLinear, dequantize, quantize, take_quantized
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import UserError
from rwkvtune.models import (
    ModelConfig,
    RWKV5Config,
    RWKV6Config,
    RWKV7Config,
    build_model,
    fill_model,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the dev extra")

KINDS = ("nf4", "fp4", "int8")
LEVELS = {
    # The quantiles of a normal distribution that QLoRA lists, arXiv:2305.14314, appendix E.
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    # Sign, two bits of exponent, one of mantissa, divided by the largest, 12.
    "fp4": [n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)],
}  # fmt: skip


def unpacked(layer: QuantizedLinear) -> Tensor:
    """The matrix by the definition of each format: [out, in]."""
    if layer.kind == "int8":
        return layer.codes * layer.scales[:, None] / 127
    codes = torch.stack([layer.codes >> 4, layer.codes & 15], dim=1).flatten().long()
    values = torch.tensor(LEVELS[layer.kind])[codes][: layer.out_features * layer.in_features]
    scaled = values * layer.scales.repeat_interleave(64)[: len(values)]
    return scaled.view(layer.out_features, layer.in_features)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(41, 96), (3, 70), (5, 7), (8, 128)])
def test_every_value_becomes_the_nearest_level_of_its_block(
    kind: str, rows: int, columns: int
) -> None:
    linear = nn.Linear(columns, rows, bias=False)
    layer = QuantizedLinear.of(linear, kind)
    w = linear.weight.detach()
    if kind == "int8":
        # Its values go through fp16 first, which moves them by up to 2^-11 of themselves.
        allowed = w.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-11)
    else:
        blocks = F.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
        levels = torch.tensor(LEVELS[kind]) * blocks.abs().amax(1)[:, None]  # [blocks,16]
        distance = (blocks[:, :, None] - levels[:, None]).abs().amin(2)
        allowed = distance.flatten()[: w.numel()].view(w.shape) + 1e-6
    assert bool(((unpacked(layer) - w).abs() <= allowed).all())
    assert torch.allclose(layer.weight, unpacked(layer), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradient_of_the_input_are_those_of_the_rounded_matrix(
    kind: str, dtype: torch.dtype, training: bool
) -> None:
    layer = QuantizedLinear.of(nn.Linear(70, 33, bias=True), kind).train(training)
    x = torch.randn(2, 5, 70, dtype=dtype, requires_grad=True)
    weight = layer.weight.to(dtype)
    assert layer.bias is not None
    expected = F.linear(x, weight) + layer.bias.to(dtype)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(y, expected)
    # The product with the transposed matrix may sum in another order.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (grad - expected_grad).abs().max() < tolerance * expected_grad.abs().max()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


CONFIGS: dict[str, ModelConfig] = {
    "x052": RWKV5Config(vocab_size=31, n_layer=2, n_embd=96, head_size=32),
    "x060": RWKV6Config(vocab_size=31, n_layer=2, n_embd=96, head_size=32),
    "x070": RWKV7Config(vocab_size=31, n_layer=2, n_embd=96, head_size=32),
}
IDS = torch.tensor([[3, 17, 0, 30, 5, 5, 9]])


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantized_model_answers_as_one_with_the_unpacked_matrices(
    version: str, kind: str
) -> None:
    model = build_model(CONFIGS[version], seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    plain = copy.deepcopy(model)
    report = quantize(model, kind)
    assert len(report.quantized) == 2 * (6 if version == "x070" else 8)
    assert report.bytes_after < report.bytes_before
    assert not any("emb" in n or "head" in n or "ln" in n for n in report.quantized)
    for name in report.quantized:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        projection = plain.get_submodule(name)
        assert isinstance(projection, nn.Linear)
        projection.weight.data = unpacked(layer)
    embeddings = model.emb(IDS).detach().requires_grad_()
    logits, state = model(inputs_embeds=embeddings)
    (grad,) = torch.autograd.grad(logits.square().sum(), embeddings)
    expected, expected_state = plain(inputs_embeds=embeddings)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), embeddings)
    assert (logits - expected).abs().max() < 1e-5
    assert (state[-1].wkv - expected_state[-1].wkv).abs().max() < 1e-5
    assert (grad - expected_grad).abs().max() < 1e-4 * expected_grad.abs().max()
    dequantize(model)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert torch.equal(model(IDS)[0], logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_quantized_model_is_saved_and_loaded_bit_for_bit(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    model = build_model(CONFIGS["x070"], seed=1)
    quantize(model, kind)
    save_weights(tmp_path / f"base{suffix}", model.state_dict())
    again = build_model(CONFIGS["x070"], seed=2)
    take_quantized(again, load_weights(tmp_path / f"base{suffix}"), "base")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_file_in_bf16_is_packed_from_its_mapped_tensors_as_from_a_copy(
    tmp_path: Path, kind: str
) -> None:
    made = build_model(CONFIGS["x070"], seed=1)
    save_weights(tmp_path / "base.pth", made.state_dict(), dtype="bf16")
    mapped, copied = (build_model(CONFIGS["x070"], initial_values=False) for _ in range(2))
    weights = load_weights(tmp_path / "base.pth")
    fill_model(mapped, weights, "base", copy=False)
    fill_model(copied, weights, "base")
    places = {t.data_ptr() for t in weights.values()}
    assert {p.data_ptr() for p in mapped.parameters()} == places  # nothing was read yet
    reports = [quantize(model, kind) for model in (mapped, copied)]
    assert reports[0] == reports[1]
    assert reports[0].bytes_before == 4 * CONFIGS["x070"].num_parameters
    assert not places & {t.data_ptr() for t in mapped.state_dict().values()}
    for name, tensor in copied.state_dict().items():
        assert torch.equal(mapped.state_dict()[name], tensor), name
        assert mapped.state_dict()[name].dtype == tensor.dtype, name


def test_what_cannot_be_quantized_is_refused() -> None:
    model = build_model(CONFIGS["x070"], seed=1)
    with pytest.raises(UserError, match="must be one of 4bit, nf4"):
        quantize(model, "nf3")
    with pytest.raises(UserError, match="no projection is called attn"):
        quantize(model, "nf4", names="attn")
    quantize(model, "nf4")
    with pytest.raises(AssertionError, match="quantized already"):
        quantize(model, "nf4")
