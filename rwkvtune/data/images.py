"""Pictures: where a data set keeps them, and what an encoder wants to see of them.

No torchvision: PIL resizes, and the numbers are those of the Hugging Face image processors.
"""

from __future__ import annotations

import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkvtune.errors import UserError
from rwkvtune.files import inside

if TYPE_CHECKING:
    from PIL.Image import Image

ARCHIVE = "images.zip"
SUBFOLDERS = ("", "images", "data")
"""Where a picture is looked for, in this order; then in ARCHIVE."""


# What zipfile raises on damaged archives has no common type.
_DAMAGED = (
    zipfile.BadZipFile, RuntimeError, OSError, EOFError, UnicodeError, struct.error, zlib.error,
)  # fmt: skip


class PictureError(UserError):
    """A picture is missing or cannot be read."""


class PictureStore:
    """The pictures of a data set by the names that its records use: files in the folder, in its
    images/ or data/, or inside images.zip, which need not be unpacked."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def find(self, name: str) -> str | zipfile.ZipInfo | None:
        """The path of a picture, or its entry in the archive; None when there is none."""
        for subfolder in SUBFOLDERS:
            path = os.fspath(inside(self.folder / subfolder, name))
            if os.path.isfile(path):
                return path
        by_name = self._archive_names
        return by_name.get(name) or by_name.get(os.path.basename(name))

    def size(self, name: str) -> int:
        """Bytes of the picture's file."""
        place = self.find(name)
        if place is None:
            raise PictureError(f"{name}: no such picture in {self.where_it_looks()}")
        return os.path.getsize(place) if isinstance(place, str) else place.file_size

    def open(self, name: str) -> Image:
        """The picture, upright, in RGB. PictureError says what is wrong with it."""
        place = self.find(name)
        if place is None:
            raise PictureError(f"{name}: no such picture in {self.where_it_looks()}")
        if isinstance(place, str):
            return read_picture(place, name)
        assert self._archive is not None
        try:
            with self._archive.open(place) as file:
                return read_picture(file, name)
        except _DAMAGED as error:
            raise PictureError(f"{name}: cannot be read from {ARCHIVE} ({error})") from error

    def where_it_looks(self) -> str:
        places = [str(self.folder / subfolder) for subfolder in SUBFOLDERS]
        return ", ".join(places) + f" or {self.folder / ARCHIVE}"

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        path = self.folder / ARCHIVE
        if not path.is_file():
            return None
        try:
            return zipfile.ZipFile(path)  # its entries may be read by several threads at once
        except (*_DAMAGED, ValueError) as error:
            raise UserError(f"{path} is no whole zip archive ({error}): load it again") from error

    @cached_property
    def _archive_names(self) -> dict[str, zipfile.ZipInfo]:
        """Entries by their full name and, where that tells them apart, by their last part."""
        if self._archive is None:
            return {}
        named = [entry for entry in self._archive.infolist() if entry.filename]
        entries = [entry for entry in named if not entry.is_dir()]
        short: dict[str, zipfile.ZipInfo | None] = {}
        for entry in entries:
            last = entry.filename.rpartition("/")[2]
            short[last] = None if last in short else entry
        full = {entry.filename: entry for entry in entries}
        return {name: entry for name, entry in short.items() if entry is not None} | full


def read_picture(file: Any, name: str) -> Image:
    """A picture from a path or an open file, turned as its EXIF data say, in RGB."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF data and palettes
            with Image.open(file) as picture:
                return as_rgb(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace(repr(file), "").strip()
        reason = reason or type(error).__name__
        raise PictureError(f"{name}: no readable picture ({reason})") from error


def as_rgb(picture: Image) -> Image:
    """In RGB. Of 16-bit grey the upper 8 bits, as PIL itself takes them of 16-bit colours; its own
    conversion of grey makes all but the darkest 255 of 65,536 values white."""
    from PIL import Image

    is_deep = picture.mode.startswith("I;16")
    if is_deep or (picture.mode == "I" and picture.getextrema()[1] > 255):  # type: ignore[operator]
        values = np.asarray(picture).clip(0, 65535).astype(np.uint16)
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    return picture.convert("RGB")


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture before an encoder sees it, as its processor's json says."""

    size: tuple[int, int] | int
    """(height, width) to resize to, whatever the proportions; or one number: that of the shorter
    side, keeping them."""
    crop: tuple[int, int] | None
    """(height, width) cut from the middle; None = nothing is cut."""
    resample: int
    """PIL's filter: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic."""
    scale: float
    """Factor of the pixel values 0 .. 255."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_processor(cls, processor: Mapping[str, Any]) -> Preprocessing:
        """Read a preprocessor_config.json; UserError for what is not one resize to a fixed size."""
        kind = processor.get("image_processor_type", "image processor")
        size, crop = processor.get("size"), processor.get("crop_size")
        wanted: tuple[int, int] | int | None = None
        if processor.get("do_resize", True):
            wanted = _pair(size) if isinstance(size, Mapping) and "height" in size else None
            if isinstance(size, Mapping) and "shortest_edge" in size:
                wanted = int(size["shortest_edge"])
            if isinstance(size, int):  # files of the first transformers versions
                wanted = size if crop else (size, size)
        cut = _pair(crop) if processor.get("do_center_crop", crop is not None) and crop else None
        if wanted is None or (isinstance(wanted, int) and cut is None):
            raise UserError(
                f"this {kind} does not bring every picture to one size (size {size}, crop_size "
                f"{crop}): expected height and width, or shortest_edge with crop_size"
            )
        normalizes = processor.get("do_normalize", True)
        return cls(
            wanted,
            cut,
            int(processor.get("resample", 3)),
            float(processor.get("rescale_factor", 1 / 255)) * processor.get("do_rescale", True)
            or 1.0,
            _triple(processor["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
            _triple(processor["image_std"]) if normalizes else (1.0, 1.0, 1.0),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) that the encoder sees."""
        if self.crop is not None:
            return self.crop
        assert not isinstance(self.size, int)
        return self.size

    def pixels(self, picture: Image) -> np.ndarray:
        """Resized and cut: uint8 [3, height, width]."""
        height, width = self._resized(picture)
        if picture.size != (width, height):
            picture = picture.resize((width, height), self.resample)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            picture = picture.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def table(self) -> np.ndarray:
        """What the encoder gets for each pixel value: float32 [3, 256].

        The processors' own operations in their order, so that the numbers are equal to the last
        bit: the product in fp64, rounded to fp32; then subtracted and divided in fp32.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))
        values: np.ndarray = (scaled - mean) / std
        return values

    def _resized(self, picture: Image) -> tuple[int, int]:
        """(height, width) after the resize."""
        if not isinstance(self.size, int):
            return self.size
        width, height = picture.size
        longer = int(self.size * max(width, height) / min(width, height))
        return (self.size, longer) if height <= width else (longer, self.size)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    return int(size), int(size)


def _triple(values: Any) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        return (float(values),) * 3
    red, green, blue = map(float, values)
    return red, green, blue
