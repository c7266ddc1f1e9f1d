"""The data of a vision run: which files, which pictures, and the cache of their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvtune.data.feature_cache import Dtype, FeatureCache
from rwkvtune.data.images import PictureStore, Preprocessing
from rwkvtune.data.llava import RecordFile
from rwkvtune.data.visual import Assembly, VisualDataset
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.models.vision.encoders import Encoder
from rwkvtune.training.log import RunLog
from rwkvtune.training.vision_config import VisionConfig

Caches = tuple[tuple[VisualDataset, FeatureCache], ...]
"""Data sets whose pictures come from a cache of features."""


def data_files(path: Path) -> tuple[Path, ...]:
    """The JSON files of a data set; the folder of pictures is `picture_folder` of them."""
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise MissingFileError(f"data_file={path}: there is no such folder or file")
    for name in ("chat.json", "chat.jsonl"):
        if (path / name).is_file():
            return (path / name,)
    texts = sorted([*path.glob("text/*.json"), *path.glob("text/*.jsonl")])
    if not texts:
        here = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{path} has neither chat.json nor chat.jsonl nor text/*.json; it has {here}"
        )
    return tuple(texts)


def picture_folder(files: Sequence[Path]) -> Path:
    parent = files[0].parent
    return parent.parent if parent.name == "text" else parent


class _Joined:
    """The records of several files, one after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [RecordFile(path) for path in files]

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def __getitem__(self, number: int) -> dict[str, Any]:
        for file in self.files:
            if number < len(file):
                return file[number]
            number -= len(file)
        raise IndexError(number)


def open_data(
    config: VisionConfig, files: Sequence[Path], assembly: Assembly, preprocessing: Preprocessing
) -> VisualDataset:
    return VisualDataset(
        _Joined(files),
        PictureStore(picture_folder(files)),
        assembly,
        preprocessing,
        ctx_len=config.ctx_len,
        on_bad=config.on_bad_data,
        num_workers=config.num_workers,
    )


def open_caches(
    config: VisionConfig, encoder: Encoder, data_sets: Sequence[VisualDataset]
) -> Caches:
    """One for each data set, checked; nothing is written."""
    if not config.feature_cache:
        return ()
    own: Dtype = "bf16" if next(encoder.parameters()).dtype == torch.bfloat16 else "fp32"
    caches = []
    for number, data in enumerate(data_sets):
        folder = Path(config.feature_cache, *["validation"] * number)
        cache = FeatureCache(
            folder,
            data.pictures,
            fingerprint=encoder.fingerprint,
            tokens=encoder.num_tokens,
            width=encoder.width,
            dtype=own if config.feature_cache_dtype == "exact" else config.feature_cache_dtype,
        )
        needed = cache.bytes_for(len(data.picture_names()))
        if 0 < config.cache_limit_gb * 1e9 < needed:
            raise UserError(
                f"feature_cache would take {needed / 1e9:.2f} GB for the pictures of "
                f"{data.pictures.folder}, more than cache_limit_gb={config.cache_limit_gb:g}"
            )
        caches.append((data, cache))
    return tuple(caches)


def fill_caches(caches: Caches, encoder: Encoder, fabric: Any, log: RunLog) -> None:
    """Encode what is not cached yet, on rank zero, and let the data sets read from there."""
    encoder = encoder.to(fabric.device)
    for data, cache in caches:

        def encode(
            names: Sequence[str], data: VisualDataset = data
        ) -> Iterator[tuple[str, Tensor]]:
            seen = [
                (name, pixels) for name in names if (pixels := data.try_pixels(name)) is not None
            ]
            if seen:
                stacked = torch.stack([torch.from_numpy(pixels) for _, pixels in seen])
                yield from zip(
                    [name for name, _ in seen], encoder(stacked.to(fabric.device)), strict=True
                )

        if fabric.is_global_zero:
            added = cache.fill(data.picture_names(), encode)
            log.line(
                f"feature cache {cache.folder}: {len(cache):,} pictures, {added:,} of them new, "
                f"{cache.bytes_for(len(cache)) / 1e9:.2f} GB in {cache.dtype}"
            )
        if fabric.world_size > 1:
            fabric.barrier()
            cache.reload()
        data.features_of = cache.read
