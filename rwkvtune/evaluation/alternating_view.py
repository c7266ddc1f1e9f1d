"""Masks and attention shares as text, pictures and tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rwkvtune.evaluation.alternating import VisualAttention
from rwkvtune.files import atomic_write
from rwkvtune.models.alternating.masks import causal_mask, special_mask

SHADES = ((1.0, "#"), (0.5, "+"), (0.0, "."))
"""Share of allowed pairs in a cell, at least -> its character; none at all is a space."""


@dataclass(frozen=True)
class LayerView:
    layer: int
    kind: str
    """causal, or the variant whose rule it follows."""
    mask: Tensor
    """[T, T] bool."""

    @property
    def pairs(self) -> int:
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Of the pairs that plain causal attention allows."""
        length = len(self.mask)
        return self.pairs / (length * (length + 1) / 2)


def layer_views(text_config: Any, modality_ids: Tensor) -> list[LayerView]:
    """The mask of every layer for one sample of modality_ids [T]."""
    length = len(modality_ids)
    plain = causal_mask(length, length)[0, 0]
    layers = text_config.num_hidden_layers
    if not hasattr(text_config, "mask_schedule"):
        return [LayerView(i, "causal", plain) for i in range(layers)]
    special = special_mask(
        text_config.rule(), modality_ids[None], length, text_only=text_config.text_only
    )[0, 0]
    return [
        LayerView(i, text_config.variant, special) if is_special else LayerView(i, "causal", plain)
        for i, is_special in enumerate(text_config.special_layers())
    ]


def runs_in_words(modality_ids: Tensor) -> str:
    """Such as "41 text, 17 visual, 12 text"."""
    values, counts = torch.unique_consecutive(modality_ids, return_counts=True)
    names = {0: "text", 1: "visual"}
    return ", ".join(
        f"{count} {names.get(value, f'modality {value}')}"
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
    )


def mask_as_text(mask: Tensor, width: int = 64) -> str:
    """A mask in at most `width` lines and columns; a cell stands for a square of pairs."""
    length = len(mask)
    size = -(-length // width)
    pad = -length % size
    both = torch.stack([mask, torch.ones_like(mask)]).float()
    both = torch.nn.functional.pad(both, (0, pad, 0, pad))
    allowed, pairs = both.unfold(1, size, size).unfold(2, size, size).sum((3, 4))
    cells = allowed / pairs  # the last ones may be smaller
    lines = []
    for row in cells.tolist():
        lines.append("".join(_shade(share) for share in row).rstrip())
    return "\n".join(lines)


def _shade(share: float) -> str:
    if share <= 0:
        return " "
    return next(letter for least, letter in SHADES if share >= least)


def draw_masks(views: Sequence[LayerView], path: Path) -> None:
    """All layers beside each other as a PNG: dark is allowed."""
    from matplotlib.figure import Figure

    columns = min(len(views), 6)
    rows = -(-len(views) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.7 * rows), layout="constrained")
    for view in views:
        axes = figure.add_subplot(rows, columns, view.layer + 1)
        axes.imshow(view.mask.numpy(), cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
        axes.set_title(f"{view.layer}: {view.kind}\n{100 * view.share:.0f} % of causal", size=8)
        axes.set_xticks([])
        axes.set_yticks([])
    _save(figure, path)


def draw_attention(table: AttentionTable, special: Sequence[bool], path: Path) -> None:
    """The share on visual tokens of every layer as a PNG: each head, their mean with its spread
    over the samples, and each image; special layers are shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    mean, spread = (values.numpy() for values in table.mean_and_spread())
    layers = range(len(mean))
    for layer, is_special in enumerate(special):
        if is_special:
            axes.axvspan(layer - 0.5, layer + 0.5, color="0.9", zorder=0)
    for head in range(mean.shape[1]):
        label = "one head" if head == 0 else None
        axes.plot(layers, mean[:, head], color="0.7", linewidth=0.8, label=label)
    label = "mean of heads, one deviation"
    axes.errorbar(layers, mean.mean(1), spread.mean(1), marker="o", color="black", label=label)
    for number, share in enumerate(table.mean_by_image(), start=1):
        axes.plot(layers, share.numpy(), linestyle="--", label=f"image {number}")
    axes.set_xlabel("layer (special ones shaded)")
    axes.set_ylabel("last prompt token's attention on visual tokens")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110, bbox_inches="tight")
    atomic_write(path, lambda file: file.write(image.getvalue()))


class AttentionTable:
    """Adds up samples one at a time, and writes them as rows of a CSV file.

    A row per sample and layer: mean over heads, then each head, then each image.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None
        self._images: list[tuple[Tensor, int]] = []
        """For the first image, the second, ...: the sum [layers] and number of samples with one."""

    def write(self, path: Path, samples: Iterable[tuple[str, VisualAttention]]) -> None:
        """All samples, in constant memory, into a CSV file that is whole or not there at all."""

        def fill(file: BinaryIO) -> None:
            text = TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            is_first = True
            for name, seen in samples:
                if is_first:
                    heads = [f"head_{h}" for h in range(seen.by_head.shape[1])]
                    writer.writerow(["sample", "layer", "mean", *heads, "images..."])
                    is_first = False
                self._add(seen)
                for layer, (heads_here, images) in enumerate(
                    zip(seen.by_head.tolist(), seen.by_image.tolist(), strict=True)
                ):
                    mean = sum(heads_here) / len(heads_here)
                    cells = [f"{value:.6f}" for value in (mean, *heads_here, *images)]
                    writer.writerow([name, layer, *cells])
            text.flush()
            text.detach()

        atomic_write(path, fill)

    def _add(self, seen: VisualAttention) -> None:
        values = seen.by_head.double()
        self._sum = values if self._sum is None else self._sum + values
        squares = values**2
        self._squares = squares if self._squares is None else self._squares + squares
        self.count += 1
        for place, share in enumerate(seen.by_image.double().T):
            if place == len(self._images):
                self._images.append((torch.zeros_like(share), 0))
            total, count = self._images[place]
            self._images[place] = total + share, count + 1

    def mean_and_spread(self) -> tuple[Tensor, Tensor]:
        """[layers, heads] each: the mean over samples, and the standard deviation."""
        assert self._sum is not None and self._squares is not None
        mean = self._sum / self.count
        return mean, (self._squares / self.count - mean**2).clamp(min=0).sqrt()

    def mean_by_image(self) -> list[Tensor]:
        """[layers] for the first image, the second, ..., over the samples that have one."""
        return [total / count for total, count in self._images]
