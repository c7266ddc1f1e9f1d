"""Frozen bases in 4 or 8 bits: what bitsandbytes packs, with products in the type of the input.

bitsandbytes' own layers are not used: on a CPU they repack their weights for bf16 when gradients
are off, round activations to 8 bits in eval mode, and keep the type of the first input for all
later ones, so that the same layer computes differently in training, validation and merging.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from rwkvtune.errors import UserError
from rwkvtune.models.layers import Linear

KINDS = {"4bit": "nf4", "nf4": "nf4", "fp4": "fp4", "8bit": "int8", "int8": "int8"}
"""What `quant` may be -> what it is. bitsandbytes itself takes 4bit for fp4, which is coarser."""

PROJECTIONS = r"(.*\.)?blocks\.\d+\.(att|ffn)\.\w+"
"""The matrices of time mix and channel mix; embedding, head and all small tensors stay as they
are."""

BLOCK_SIZE = 64
"""Values that share an fp32 scale in nf4 and fp4."""


BYTES_PER_VALUE = {"nf4": 0.5 + 4 / BLOCK_SIZE, "fp4": 0.5 + 4 / BLOCK_SIZE, "int8": 1.0}
"""Of a packed weight, scales included where they count."""


class QuantizedLinear(nn.Linear):
    """A projection whose weight is packed: y = x dequantized(weight)ᵀ + bias.

    Its state dict holds the packed values under the name of their kind, nf4 or fp4 (uint8
    [ceil(out * in / 2)]) or int8 (int8 [out, in]), and `scales` (fp32, one for each BLOCK_SIZE
    values in their order, or one for each row).
    """

    scales: Tensor

    def __init__(self, in_features: int, out_features: int, kind: str, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a whole weight
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        fixed = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", fixed)
        size = in_features * out_features
        if kind == "int8":
            codes, num_scales = (
                torch.empty(out_features, in_features, dtype=torch.int8),
                out_features,
            )
        else:
            codes = torch.empty(-(-size // 2), dtype=torch.uint8)
            num_scales = -(-size // BLOCK_SIZE)
        self.register_buffer(kind, codes)
        self.register_buffer("scales", torch.empty(num_scales, dtype=torch.float32))

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> QuantizedLinear:
        """The packed form of a projection."""
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        packed = cls(linear.in_features, linear.out_features, kind, bias)
        functional = bitsandbytes_functional()
        if kind == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        else:
            # For an odd number of values, bitsandbytes would compile other code, for minutes.
            values = F.pad(weight.float().flatten(), (0, weight.numel() % 2))
            codes, state = functional.quantize_4bit(
                values[None],
                blocksize=BLOCK_SIZE,
                compress_statistics=False,
                quant_type=kind,
            )
            codes, scales = codes.flatten(), state.absmax
        setattr(packed, kind, codes)
        packed.scales = scales
        return packed.train(linear.training)

    @property
    def codes(self) -> Tensor:
        """The packed values."""
        codes: Tensor = getattr(self, self.kind)
        return codes

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] fp32, made anew for each reader; changing it changes nothing."""
        return self.dequantized(torch.float32)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[out, in]; each value is rounded to `dtype` once."""
        if self.kind == "int8":
            return torch.mul(self.codes, self.scales[:, None] / 127.0).to(dtype)
        functional = bitsandbytes_functional()
        state = functional.QuantState(
            absmax=self.scales,
            # As one row: bitsandbytes 0.50.2 on a CPU takes the wrong scales for a matrix whose
            # rows end inside a block.
            shape=torch.Size((1, 2 * self.codes.numel())),
            code=_levels(self.kind, self.scales.device),
            blocksize=BLOCK_SIZE,
            quant_type=self.kind,
            dtype=dtype,
        )
        flat: Tensor = functional.dequantize_4bit(self.codes.view(-1, 1), state)
        size = self.out_features * self.in_features
        return flat[0, :size].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ that keeps only the packed weight for its backward pass, which has no gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


@dataclass(frozen=True)
class QuantReport:
    """What quantize has done."""

    kind: str
    """nf4, fp4 or int8."""
    quantized: tuple[str, ...]
    """Names of the modules that are packed now."""
    kept: dict[str, int]
    """Parameters in full precision -> bytes."""
    bytes_before: int
    """Of all parameters and buffers of the model in fp32."""
    bytes_after: int
    """As they are now."""

    def in_words(self) -> str:
        """One line for the start of a run."""
        parts = dict.fromkeys(
            re.sub(r"(^|\.)(blocks|layers)\.\d+\.", r"\1*.", name) for name in self.kept
        )
        return (
            f"{self.kind}: {len(self.quantized)} matrices packed, weights "
            f"{self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB; in full "
            f"precision {sum(self.kept.values()) / 1e6:.2f} MB in {len(self.kept)} tensors: "
            + " ".join(parts)
        )


def quantize(model: nn.Module, kind: str, *, names: str = PROJECTIONS) -> QuantReport:
    """Pack the projections of a model in place, where it stands (CPU or GPU), and freeze them; all
    other parameters are fp32 then.

    The weights must be loaded, and nothing may be wrapped around the projections yet. They may be
    tensors of a memory-mapped file, of any float type, from which nothing is kept: then packing
    takes only as much memory as the largest of them.
    kind: 4bit (= nf4), nf4, fp4, 8bit (= int8) or int8.
    names: regular expression that the whole name of an nn.Linear must match to be packed.
    UserError for an unknown kind, or when no nn.Linear of that name is there.
    """
    if kind not in KINDS:
        raise UserError(f"quant={kind!r} must be one of {', '.join(KINDS)}")
    bitsandbytes_functional()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = [name for name in linears if re.fullmatch(names, name)]
    if not chosen:
        raise UserError(
            f"quant={kind}: no projection is called {names}; there are "
            + (", ".join(list(linears)[:8]) or "none at all")
        )
    before = sum(4 * t.numel() for t in (*model.parameters(), *model.buffers()))
    for name in chosen:
        linear = linears[name]
        assert not linear.weight.is_meta, f"{name} has no values yet: load the weights first"
        assert not name.endswith(".base_layer"), f"{name} is wrapped already: quantize first"
        assert not isinstance(linear, QuantizedLinear), f"{name} is quantized already"
        _replace(model, name, QuantizedLinear.of(linear, KINDS[kind]))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    kept = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    return QuantReport(KINDS[kind], tuple(chosen), kept, before, bytes_of(model))


def take_quantized(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load the state dict of a quantized model, bit for bit, into one that is not quantized yet.

    source: the file's name, for the message.  UserError when a tensor is missing, unknown or of
    another shape.
    """
    for key in weights:
        name, _, kind = key.rpartition(".")
        if kind in KINDS.values():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), name
            bias = None if linear.bias is None else linear.bias.detach()
            empty = QuantizedLinear(linear.in_features, linear.out_features, kind, bias)
            _replace(model, name, empty.train(linear.training))
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise UserError(f"{source} does not fit this model: {reasons}") from None


def dequantize(model: nn.Module) -> None:
    """Turn the packed projections of a model back into plain ones, fp32, with the rounded values
    that they compute with."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                # With a bias it was never a projection of our own models.
                plain = (
                    Linear(module.in_features, module.out_features)
                    if module.bias is None
                    else nn.Linear(module.in_features, module.out_features)
                )
            plain.weight = nn.Parameter(module.weight, requires_grad=False)
            plain.bias = module.bias
            _replace(model, name, plain.train(module.training))


def adamw_8bit(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> Optimizer:
    """bitsandbytes' AdamW with both moments in 8 bits, whatever the size of a parameter."""
    bitsandbytes_functional()
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, min_8bit_size=1
    )
    return optimizer


def adamw_8bit_maps(device: torch.device) -> dict[str, Tensor]:
    """The levels of adamw_8bit's two moments, which its state holds beside them."""
    create = bitsandbytes_functional().create_dynamic_map
    return {"qmap1": create(signed=True).to(device), "qmap2": create(signed=False).to(device)}


def bytes_of(model: nn.Module) -> int:
    """Of all parameters and buffers; what two modules share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@cache
def _levels(kind: str, device: torch.device) -> Tensor:
    """The 16 values that codes stand for."""
    levels: Tensor = bitsandbytes_functional().get_4bit_type(kind, device=device)
    return levels


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


@cache
def bitsandbytes_functional() -> Any:
    """bitsandbytes.functional; UserError where the package is missing."""
    # It warns that an optional package with other kernels is missing, which nothing here calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ModuleNotFoundError as error:
        raise UserError(
            "packed weights (quant, bits) and optimizer adamw8bit need the package bitsandbytes: "
            "pip install 'rwkvtune[quant]'"
        ) from error
    return functional
