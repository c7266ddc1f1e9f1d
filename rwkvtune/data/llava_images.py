"""Pictures to the views that a vision tower sees, and how many tokens they will become.

Sizes are (width, height) in pixels. Source: LLaVA-NeXT, `mm_utils.py`. The views of an image are
[views, 3, S, S], the whole image first, then the tiles of its canvas row by row.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rwkvtune.data.images import as_rgb
from rwkvtune.errors import MissingFileError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = STD = 0.5
"""SigLIP's, of all channels."""
PAD_COLOUR = (127, 127, 127)
"""The mean as a colour."""
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

Size = tuple[int, int]


def canvases(pinpoints: str | Sequence[Sequence[int]], view_size: int) -> list[Size]:
    """image_grid_pinpoints as (width, height): "(1x1),...,(6x6)" in views, or a list in pixels."""
    if isinstance(pinpoints, str):
        cells = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)\s*x\s*(\d+)\)", pinpoints)]
        if len(cells) >= 2 and "..." in pinpoints:
            (w0, h0), (w1, h1) = cells[0], cells[-1]
            cells = [(w, h) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
        if cells:
            return [(w * view_size, h * view_size) for w, h in cells]
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"image_grid_pinpoints is {pinpoints!r}: expected (1x1),...,(6x6) or "
                "[[width, height], ...]"
            ) from error
    points: Any = pinpoints
    return [(int(w), int(h)) for w, h in points]


def best_canvas(size: Size, choices: Sequence[Size]) -> Size:
    """The canvas on which most pixels of an image of this size survive; of equals the one with
    the least empty space, then the first."""
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, -(canvas[0] * canvas[1] - used)

    return max(choices, key=merit)


@dataclass(frozen=True)
class ImageProcessor:
    """How images are cut into views and counted in tokens. Needs PIL, no torchvision."""

    view_size: int = 384
    patch_size: int = 14
    image_aspect_ratio: str = "square"
    """square (also nobase: a plain resize), pad (onto a square of the mean colour), anyres,
    anyres_max_N."""
    image_grid_pinpoints: str | Sequence[Sequence[int]] = "(1x1),...,(6x6)"
    mm_patch_merge_type: str = "spatial_unpad"
    mm_newline_position: str = "one_token"
    mm_spatial_pool_stride: int = 2
    mm_spatial_pool_mode: str = "bilinear"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"square|nobase|pad|anyres(_max_\d+)?", self.image_aspect_ratio):
            raise UserError(
                f"image_aspect_ratio={self.image_aspect_ratio} is not supported: choose square, "
                "pad, anyres or anyres_max_N"
            )
        merge = self.mm_patch_merge_type
        if not re.fullmatch(r"flat|spatial(_(unpad|maxpool2x2|nobase))*", merge):
            raise UserError(
                f"mm_patch_merge_type={merge} is not known: choose flat, spatial or spatial_unpad, "
                "also with _maxpool2x2 or _nobase"
            )
        canvases(self.image_grid_pinpoints, self.view_size)

    @property
    def canvases(self) -> list[Size]:
        return canvases(self.image_grid_pinpoints, self.view_size)

    @property
    def is_anyres(self) -> bool:
        return self.image_aspect_ratio.startswith("anyres")

    def views(self, image: Image, *, alone: bool = True) -> Tensor:
        """[views, 3, S, S] of an image; one of several in a sample is padded to a single view."""
        if not alone or self.image_aspect_ratio == "pad":
            return self._normalised([_squared(image)])
        if not self.is_anyres:
            return self._normalised([image])
        canvas = _on_canvas(image, best_canvas(image.size, self.canvases))
        s = self.view_size
        tiles = [
            canvas.crop((x, y, x + s, y + s))
            for y in range(0, canvas.height, s)
            for x in range(0, canvas.width, s)
        ]
        return self._normalised([image, *tiles])

    def frames(self, images: Sequence[Image]) -> Tensor:
        """[F, 3, S, S] of the frames of a video."""
        return self._normalised(images)

    def _normalised(self, images: Sequence[Image]) -> Tensor:
        from PIL.Image import Resampling

        size = (self.view_size, self.view_size)
        arrays = []
        for image in images:
            if image.size != size:
                image = image.resize(size, Resampling.BICUBIC)
            arrays.append(np.asarray(image, dtype=np.float32))
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # [N, S, S, 3]
        return (pixels / 255 - MEAN) / STD

    def image_tokens(self, size: Size, *, alone: bool = True) -> int:
        """How many tokens the views of an image of this size become."""
        side = self.view_size // self.patch_size
        base = side * side
        merge = self.mm_patch_merge_type
        has_tiles = alone and self.is_anyres
        if not has_tiles:
            return base + ("unpad" in merge)
        canvas = best_canvas(size, self.canvases)
        rows, cols = canvas[1] // self.view_size * side, canvas[0] // self.view_size * side
        if merge == "flat":
            return base + rows * cols
        if "maxpool2x2" in merge:
            tiles = (rows // 2) * (cols // 2)
        elif "unpad" in merge:
            height, width = self._unpadded(size, rows, cols)
            tiles = height * (width + 1)
        else:
            tiles = rows * cols
        return tiles + (0 if "nobase" in merge else base)

    def _unpadded(self, size: Size, rows: int, cols: int) -> tuple[int, int]:
        """(height, width) of the feature grid without the canvas's empty border, shrunk to N views
        if anyres_max_N asks for it."""
        width, height = size
        if width / height > cols / rows:
            border = (rows - int(round(height * (cols / width), 7))) // 2
            rows -= 2 * border
        else:
            border = (cols - int(round(width * (rows / height), 7))) // 2
            cols -= 2 * border
        limit = re.fullmatch(r"anyres_max_(\d+)", self.image_aspect_ratio)
        if limit:
            base = (self.view_size // self.patch_size) ** 2
            shrink = math.sqrt(rows * cols / (int(limit[1]) * base))
            if shrink > 1.1:
                return int(rows // shrink), int(cols // shrink)
        return rows, cols

    def video_tokens(self, num_frames: int) -> int:
        side, stride = self.view_size // self.patch_size, self.mm_spatial_pool_stride
        pooled = side // stride
        if self.mm_spatial_pool_mode == "bilinear":
            pooled = math.ceil(side / stride)
        newlines = {"grid": pooled * num_frames, "frame": num_frames, "one_token": 1}
        return pooled * pooled * num_frames + newlines.get(self.mm_newline_position, 0)


def open_picture(path: Path) -> Image:
    """A picture in RGB; UserError that names the file when it is none."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return as_rgb(image)
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no picture {path}") from error
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from error


def sampled_frames(paths: Sequence[Path], limit: int) -> list[int]:
    """Indices of at most `limit` frames at equal distances, first and last included; 0 = all."""
    if not limit or len(paths) <= limit:
        return list(range(len(paths)))
    return [int(i) for i in np.linspace(0, len(paths) - 1, limit)]


def _squared(image: Image) -> Image:
    """Centred on a square of the mean colour."""
    import PIL.Image

    side = max(image.size)
    if image.size == (side, side):
        return image
    square = PIL.Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _on_canvas(image: Image, canvas: Size) -> Image:
    """As large as it fits, its proportions kept, centred on black."""
    import PIL.Image

    width, height = image.size
    if canvas[0] / width < canvas[1] / height:
        size = canvas[0], min(math.ceil(height * canvas[0] / width), canvas[1])
    else:
        size = min(math.ceil(width * canvas[1] / height), canvas[0]), canvas[1]
    result = PIL.Image.new("RGB", canvas)
    offset = ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
    result.paste(image.resize(size, PIL.Image.Resampling.BICUBIC), offset)
    return result
