"""From the features of an image's views, or a video's frames, to the tokens that the decoder gets.

P = S x S features of a view [P, D], S = 27 for the published vision tower. Sizes are
(width, height) in pixels. Source: LLaVA-NeXT, `prepare_inputs_labels_for_multimodal`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image


@dataclass(frozen=True)
class PackingRule:
    """How a checkpoint arranges visual tokens, from the fields of its configuration."""

    grid_pinpoints: Sequence[tuple[int, int]]
    """(height, width) of the canvases that an image may be laid on, in pixels."""
    view_size: int
    """Side of a view in pixels."""
    max_tiles: int | None
    """N of anyres_max_N: more than 1.1 times N views' features are shrunk to N."""
    merge: str = "spatial_unpad"
    newline: str = "one_token"
    """Where a video gets newline tokens: grid, frame, one_token, no_token."""
    pool_stride: int = 2
    pool_mode: str = "bilinear"

    @classmethod
    def of(cls, config: Any) -> PackingRule:
        """From the configuration of a composed model, with LLaVA's fields where it has them."""
        aspect = getattr(config, "image_aspect_ratio", None) or config.vision_aspect_ratio
        found = re.fullmatch(r"anyres_max_(\d+)", aspect)
        merge = getattr(config, "mm_patch_merge_type", None) or "spatial_unpad"
        newline = getattr(config, "mm_newline_position", None) or "one_token"
        if merge == "flat" or (newline == "one_token" and "unpad" not in merge):
            newline = "no_token"
        return cls(
            grid_pinpoints=[(h, w) for h, w in config.image_grid_pinpoints],
            view_size=config.vision_config.image_size,
            max_tiles=int(found[1]) if found else None,
            merge=merge,
            newline=newline,
            pool_stride=getattr(config, "mm_spatial_pool_stride", None) or 2,
            pool_mode=getattr(config, "mm_spatial_pool_mode", None) or "bilinear",
        )


def image_features(
    views: Tensor, size: tuple[int, int], newline: Tensor, rule: PackingRule
) -> Tensor:
    """Tokens [n, D] of one image from its views [1 + tiles, P, D], the whole image first."""
    if rule.merge == "flat":
        return views.flatten(0, 1)
    base, tiles = views[0], views[1:]
    if not len(tiles):
        return torch.cat([base, newline[None].to(base)]) if "unpad" in rule.merge else base
    side = math.isqrt(base.shape[0])
    width, height = int(size[0]), int(size[1])
    canvas = select_best_resolution((height, width), list(rule.grid_pinpoints))
    rows, cols = (int(length) // rule.view_size for length in canvas)
    grid = tiles.view(rows, cols, side, side, -1).permute(4, 0, 2, 1, 3)
    grid = grid.flatten(1, 2).flatten(2, 3)  # [D, rows*S, cols*S]
    if "maxpool2x2" in rule.merge:
        grid = F.max_pool2d(grid[None], 2)[0]
    elif "unpad" in rule.merge:
        grid = unpad_image(grid, (height, width))
        h, w = grid.shape[1:]
        shrink = math.sqrt(h * w / (rule.max_tiles * side**2)) if rule.max_tiles else 1.0
        if shrink > 1.1:
            target = [int(h // shrink), int(w // shrink)]
            grid = F.interpolate(grid[None], target, mode="bilinear")[0]
        column = newline[:, None, None].expand(-1, grid.shape[1], 1).to(grid)
        grid = torch.cat([grid, column], dim=-1)
    tokens = grid.flatten(1).T  # [D, h, w] -> [h*w, D]
    return tokens if "nobase" in rule.merge else torch.cat([base, tokens])


def frame_features(frames: Tensor, newline: Tensor, rule: PackingRule) -> Tensor:
    """Tokens [n, D] of a video from its frames [F, P, D]."""
    side = math.isqrt(frames.shape[1])
    grid = frames.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [F, D, S, S]
    if rule.pool_mode == "average":
        grid = F.avg_pool2d(grid, rule.pool_stride)
    elif rule.pool_mode == "max":
        grid = F.max_pool2d(grid, rule.pool_stride)
    else:
        target = [math.ceil(side / rule.pool_stride)] * 2
        grid = F.interpolate(grid, target, mode="bilinear")
    newline = newline.to(grid)
    if rule.newline == "grid":
        column = newline[:, None, None].expand(len(grid), -1, grid.shape[2], 1)
        grid = torch.cat([grid, column], dim=-1)
    tokens = grid.flatten(2).transpose(1, 2)  # [F, D, h, w] -> [F, h*w, D]
    if rule.newline == "frame":
        tokens = torch.cat([tokens, newline.expand(len(tokens), 1, -1)], dim=1)
    tokens = tokens.flatten(0, 1)
    return torch.cat([tokens, newline[None]]) if rule.newline == "one_token" else tokens
