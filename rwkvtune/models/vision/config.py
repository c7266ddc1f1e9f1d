"""What an adapter looks like, in numbers. No torch here: `--help` and `inspect` may read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from rwkvtune.errors import UserError

PREFIXES = ("modality.world_encoder.adapter.", "proj.", "adapter.")
"""What published weights put before an adapter's names: WorldRWKV with `world_encoder`, the later
one, and ours in a resume state."""


@dataclass(frozen=True)
class AdapterConfig:
    """From the encoder's tokens [n, encoder_width] to the language model's [m, n_embd].

        z = W2 act(W1 x + b1) + b2;  out = z + LayerNorm(z)      hidden > 0
        out = W x                                                hidden = 0

    Before it, at most one of two ways to make fewer tokens: a convolution over them without bias
    and padding, or a pixel shuffle that lays shuffle x shuffle neighbours side by side.
    Source: WorldRWKV, ModRWKV (arXiv:2505.14505).
    """

    encoder_width: int
    n_embd: int
    hidden: int
    """Width between the two layers: 4 n_embd as published since July 2025, 2 n_embd before;
    0 = a single layer without bias."""
    conv_kernel: int = 0
    """Tokens under the convolution; 0 = none."""
    conv_stride: int = 0
    shuffle: int = 1
    """Side of the square of tokens that become one."""
    norm: bool = True
    """Add LayerNorm(z)."""
    activation: Literal["relu", "gelu"] = "relu"

    def __post_init__(self) -> None:
        sizes = (self.encoder_width, self.n_embd, self.shuffle)
        if min(sizes) < 1 or min(self.hidden, self.conv_kernel, self.conv_stride) < 0:
            raise UserError(f"an adapter needs positive widths, got {self}")
        if (self.conv_kernel > 0) != (self.conv_stride > 0):
            raise UserError(
                f"a convolution needs kernel and stride, got {self.conv_kernel} and "
                f"{self.conv_stride}"
            )
        if self.conv_kernel and self.shuffle > 1:
            raise UserError("an adapter has a convolution or a pixel shuffle, not both: give one")

    @property
    def input_width(self) -> int:
        """Of the first layer."""
        return self.encoder_width * self.shuffle**2

    @property
    def num_parameters(self) -> int:
        C, H, width = self.n_embd, self.hidden, self.input_width
        layers = (width + 1) * H + (H + 1) * C if H else width * C
        return layers + 2 * C * self.norm + self.conv_kernel * self.encoder_width**2

    def num_tokens(self, encoder_tokens: int) -> int:
        """Tokens per picture that the language model sees; UserError when these do not fit."""
        if self.conv_kernel:
            if encoder_tokens < self.conv_kernel:
                raise UserError(
                    f"adapter_conv {self.conv_kernel},{self.conv_stride} needs at least "
                    f"{self.conv_kernel} tokens, the encoder gives {encoder_tokens}"
                )
            return (encoder_tokens - self.conv_kernel) // self.conv_stride + 1
        if self.shuffle == 1:
            return encoder_tokens
        side = isqrt(encoder_tokens)
        if side * side != encoder_tokens or side % self.shuffle:
            raise UserError(
                f"a pixel shuffle of {self.shuffle} needs a square of tokens whose side it "
                f"divides, the encoder gives {encoder_tokens}: leave it out, or use adapter_conv"
            )
        return (side // self.shuffle) ** 2


def adapter_config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], *, encoder_width: int | None = None
) -> AdapterConfig:
    """Read an adapter's form from its tensors' names (without prefix) and shapes.

    encoder_width: of the encoder that it is for; needed to tell a pixel shuffle, which makes the
    first layer wider. Not in the shapes: the stride of a convolution, which in all published ones
    is its kernel less 1, and GELU, which the one without a norm has.
    """
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    kernels = [shape for shape in shapes.values() if len(shape) == 3]
    norm = any("norm" in name for name in shapes)
    if len(matrices) not in (1, 2) or len(kernels) > 1:
        raise UserError(
            "these tensors are no adapter: expected one or two matrices and at most one "
            f"convolution, found {', '.join(f'{n} {list(s)}' for n, s in shapes.items()) or 'none'}"
        )
    hidden = matrices[0][0] if len(matrices) == 2 else 0
    n_embd, width = matrices[-1][0], matrices[0][1]
    kernel = kernels[0][2] if kernels else 0
    shuffle = 1
    if encoder_width and width != encoder_width and width % encoder_width == 0:
        side = isqrt(width // encoder_width)
        shuffle = side if side * side * encoder_width == width else 1
    return AdapterConfig(
        encoder_width=width // shuffle**2,
        n_embd=n_embd,
        hidden=hidden,
        conv_kernel=kernel,
        conv_stride=max(kernel - 1, 1) if kernel else 0,
        shuffle=shuffle,
        norm=norm,
        activation="relu" if norm or not hidden else "gelu",
    )


def split_names(names: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Sort the tensors of a published multimodal file: {our name: name in the file} of the language
    model and of the adapter, and the names of the encoder's.

    WorldRWKV until July 2025 has bare names beside `modality.world_encoder.*`; later ones have
    `llm.*`, `proj.*` and `encoder.*`.
    """
    llm: dict[str, str] = {}
    adapter: dict[str, str] = {}
    encoder: list[str] = []
    for name in names:
        if name.startswith(("encoder.", "modality.world_encoder.model.")):
            encoder.append(name)
        elif (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
            adapter[_plain(name.removeprefix(prefix))] = name
        elif name.startswith("modality."):
            encoder.append(name)
        else:
            llm[name.removeprefix("llm.")] = name
    return llm, adapter, encoder


def adapter_names(names: Mapping[str, Any]) -> dict[str, str]:
    """{our name: name in the file} of the adapter in any published file, or in a file of an adapter
    alone, ours or one whose names have no prefix."""
    _, adapter, encoder = split_names(names)
    others = [n for n in names if n not in encoder and n not in adapter.values()]
    is_alone = not any(n == "emb.weight" or n.startswith(("blocks.", "llm.")) for n in others)
    if is_alone and any(n.startswith(("mlp.", "pre_norm.", "conv")) for n in others):
        # The names have no prefix, so that what looks like one is a part of them.
        return {_plain(n): n for n in names if n not in encoder}
    return adapter


def _plain(name: str) -> str:
    """A tensor's name inside our adapter: proj.0, proj.2, pre_norm or conv, whatever the layers of
    a published one are called."""
    parts = name.split(".")
    end = parts[-1]
    if "norm" in name:
        return f"pre_norm.{end}"
    if "conv" in name:
        return f"conv.{end}"
    number = next((part for part in parts if part.isdecimal()), None)
    return f"proj.{end}" if number is None else f"proj.{number}.{end}"
