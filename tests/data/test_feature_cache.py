"""The cache of features: exact values, whole after a crash, refused where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rwkvtune.data import feature_cache
from rwkvtune.data.feature_cache import FeatureCache
from rwkvtune.data.images import PictureError, PictureStore
from rwkvtune.errors import UserError

NAMES = [f"{i}.png" for i in range(7)]


def features(name: str) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(int(name[0])))


def encode(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, features(name)) for name in names)


@pytest.fixture
def pictures(tmp_path: Path) -> PictureStore:
    for name in NAMES:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return PictureStore(tmp_path)


def cache_of(pictures: PictureStore, folder: Path, **changes: Any) -> FeatureCache:
    settings: dict[str, Any] = {"fingerprint": "f", "tokens": 3, "width": 5, "dtype": "fp32"}
    return FeatureCache(folder, pictures, **(settings | changes))


@pytest.mark.parametrize(("dtype", "entry"), [("fp32", 60), ("bf16", 30), ("int8", 15 + 12)])
def test_what_was_kept_comes_back_over_several_shards(
    dtype: str, entry: int, pictures: PictureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 3 * entry)
    folder = tmp_path / "cache"
    assert cache_of(pictures, folder, dtype=dtype).fill(NAMES, encode, at_once=2) == 7
    sizes = [path.stat().st_size for path in sorted(folder.glob("features-*.bin"))]
    assert sizes == [3 * entry, 3 * entry, entry]
    again = cache_of(pictures, folder, dtype=dtype)
    assert len(again) == 7 and again.fill(NAMES, encode) == 0
    for name in reversed(NAMES):
        x, found = features(name), again.read(name)
        if dtype == "fp32":
            assert torch.equal(found, x)
        elif dtype == "bf16":
            assert torch.equal(found, x.bfloat16())
        else:
            step = x.abs().amax(dim=1, keepdim=True) / 127
            assert ((found - x).abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("damage", ["entry cut short", "line missing", "line cut short"])
def test_what_a_killed_writer_leaves_is_a_whole_cache_of_fewer_pictures(
    damage: str, pictures: PictureStore, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    cache_of(pictures, folder).fill(NAMES[:4], encode)
    shard, index = folder / "features-00000.bin", folder / "index.jsonl"
    if damage == "entry cut short":
        shard.write_bytes(shard.read_bytes()[:-7])
    else:
        lines = index.read_bytes().splitlines(keepends=True)
        index.write_bytes(b"".join(lines[:3]) + (lines[3][:4] if "cut" in damage else b""))
    cache = cache_of(pictures, folder)
    assert len(cache) == 3
    assert cache.fill(NAMES, encode) == 4
    for found in (cache, cache_of(pictures, folder)):
        assert all(torch.equal(found.read(name), features(name)) for name in NAMES)


def test_another_encoder_size_or_picture_is_refused(pictures: PictureStore, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache_of(pictures, folder).fill(NAMES, encode)
    for change in ({"fingerprint": "g"}, {"tokens": 4}, {"dtype": "int8"}):
        with pytest.raises(UserError, match=f"{next(iter(change))} "):
            cache_of(pictures, folder, **change)
    values = np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / NAMES[2])
    with pytest.raises(UserError, match=r"2\.png was \d+ bytes long"):
        cache_of(pictures, folder)


def test_a_picture_that_could_not_be_encoded_says_why(
    pictures: PictureStore, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    cache = cache_of(pictures, tmp_path / "cache")
    cache.fill(NAMES, encode)
    with pytest.raises(PictureError, match=r"bad\.png: no readable picture"):
        cache.read("bad.png")
