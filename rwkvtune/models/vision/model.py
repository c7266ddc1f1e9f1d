"""A language model that sees pictures: their tokens stand among those of the text.

    features = encoder(pixels)                      frozen unless it is trained too
    x = emb[ids], but rows of adapter(features) at the places of pictures
    logits = rwkv(x)                                ln0 of the first block is applied to both

Shapes: B samples, T tokens, N pictures, n encoder tokens of width E, m tokens of a picture in the
language model, width C.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rwkvtune.models.frame import LanguageModel
from rwkvtune.models.layers import Head, State
from rwkvtune.models.vision.config import AdapterConfig

PUBLISHED_PREFIX = "modality.world_encoder.adapter."
"""Before the adapter's names where it lies in one file with bare names of the language model."""


class Adapter(nn.Module):
    """features [N, n, E] -> tokens for the language model [N, m, C]; see AdapterConfig."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        C, H, width = config.n_embd, config.hidden, config.input_width
        if config.conv_kernel:
            E = config.encoder_width
            self.conv = nn.Conv1d(E, E, config.conv_kernel, config.conv_stride, bias=False)
        self.proj: nn.Module
        if H:
            act = nn.ReLU() if config.activation == "relu" else nn.GELU()
            self.proj = nn.Sequential(nn.Linear(width, H), act, nn.Linear(H, C))
        else:
            self.proj = nn.Linear(width, C, bias=False)
            nn.init.normal_(self.proj.weight, std=0.02)
        if config.norm:
            self.pre_norm = nn.LayerNorm(C)  # upstream's name; it acts behind the projection

    def forward(self, features: Tensor) -> Tensor:
        x = features.to(next(self.parameters()).dtype)
        if self.config.conv_kernel:
            x = self.conv(x.mT).mT  # over tokens: [N,n,E] -> [N,m,E]
        if self.config.shuffle > 1:
            x = pixel_shuffled(x, self.config.shuffle)
        z = self.proj(x)
        out: Tensor = z + self.pre_norm(z) if self.config.norm else z
        return out


def pixel_shuffled(x: Tensor, r: int) -> Tensor:
    """[N, n, E] -> [N, n / r^2, r^2 E]: r x r neighbours of a square of tokens side by side, row by
    row."""
    N, n, E = x.shape
    side = int(n**0.5)
    x = x.view(N, side // r, r, side // r, r, E).transpose(2, 3)
    return x.reshape(N, n // r**2, r * r * E)


class VisionLanguageModel(nn.Module):
    def __init__(self, llm: LanguageModel, encoder: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.llm, self.encoder, self.adapter = llm, encoder, adapter
        self.config: Any = llm.config

    def forward(
        self,
        input_ids: Tensor,
        state: State | None = None,
        *,
        image_positions: Tensor | None = None,
        image_rows: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        head: Head | None = None,
    ) -> tuple[Tensor, State]:
        """Run T tokens after `state`, as `LanguageModel` does.

        image_positions: bool [B, T], where a picture's tokens stand; ids are not read there.
        image_rows: int64, one per such place in the order of [B, T]: which of the N * m rows of all
        pictures' tokens stands there; None = all of them, in their order.
        pixels: uint8 [N, 3, height, width], or features: [N, n, E] in their place.
        """
        x = self.llm.emb(input_ids)
        if image_positions is not None:
            if features is None:
                features = self.encoder(pixels)
            tokens = self.adapter(features).flatten(0, 1)  # [N,m,C] -> [Nm,C]
            if image_rows is not None:
                tokens = tokens[image_rows]
            x = x.masked_scatter(image_positions[:, :, None], tokens.to(x.dtype))
        out: tuple[Tensor, State] = self.llm(inputs_embeds=x, state=state, head=head)
        return out


def labelled_rows(hidden: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """hidden [B, T, C] and targets [B, T] of the positions that have a target: [n, C] and [n].

    Captions take 10 to 30 of some 760 positions: the head runs on these alone.
    """
    places = (targets.flatten() != ignored).nonzero()[:, 0]
    return hidden.flatten(0, 1).index_select(0, places), targets.flatten()[places]
