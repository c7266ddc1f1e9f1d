"""Pictures: the numbers of the Hugging Face processors, and where files are found."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rwkvtune.data.images import PictureError, PictureStore, Preprocessing
from rwkvtune.data.llava_images import open_picture
from rwkvtune.errors import UserError

SIZES = [(640, 480), (31, 57), (48, 48), (100, 30)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def processors() -> dict[str, Any]:
    from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

    small = {"height": 42, "width": 42}
    return {
        "siglip, bicubic": SiglipImageProcessorPil(size=small),
        "siglip 2, bilinear": SiglipImageProcessorPil(size=small, resample=2),
        "clip": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=small),
        "dinov2": BitImageProcessorPil(
            size={"shortest_edge": 50}, crop_size=small, image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        "odd sizes": CLIPImageProcessorPil(
            size={"shortest_edge": 47}, crop_size={"height": 30, "width": 41}
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["siglip, bicubic", "siglip 2, bilinear", "clip", "dinov2", "odd sizes"]
)
def test_pixels_equal_the_processors_to_the_last_bit(name: str) -> None:
    processor = processors()[name]
    ours = Preprocessing.from_processor(processor.to_dict())
    table = ours.table()
    for size in SIZES:
        image = picture(size)
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        pixels = ours.pixels(image)
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == ours.shape
        values = np.stack([table[c][pixels[c]] for c in range(3)])
        np.testing.assert_array_equal(values, theirs)


@pytest.mark.parametrize(
    "processor",
    [
        {"size": {"longest_edge": 384}, "image_mean": 0.5, "image_std": 0.5},
        {"size": {"shortest_edge": 384}, "image_mean": 0.5, "image_std": 0.5},
        {"patch_size": 16, "max_num_patches": 256, "image_mean": 0.5, "image_std": 0.5},
    ],
)
def test_a_processor_without_one_fixed_size_is_refused(processor: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="to one size"):
        Preprocessing.from_processor(processor)


def test_a_picture_is_found_in_the_folder_its_subfolders_and_the_archive(tmp_path: Path) -> None:
    colours = {name: (i, 2 * i, 3 * i) for i, name in enumerate("abcdef")}

    def png(name: str) -> bytes:
        return saved(Image.new("RGB", (4, 4), colours[name]))

    for place in ("a.png", "images/b.png", "data/c.png", "x/y/d.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(png(Path(place).stem))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("images/e.png", png("e"))
        archive.writestr("f.png", png("f"))
        archive.writestr("one/twice.png", png("a"))
        archive.writestr("two/twice.png", png("b"))
    store = PictureStore(tmp_path)
    names = {"a": "a.png", "b": "b.png", "c": "c.png", "d": "x/y/d.png", "e": "e.png", "f": "f.png"}
    for letter, name in names.items():
        assert store.open(name).getpixel((0, 0)) == colours[letter], name
    assert store.open("two/twice.png").getpixel((0, 0)) == colours["b"]
    assert store.find("twice.png") is None, "the last part of the name tells no one apart"
    with pytest.raises(PictureError, match=r"no\.png: no such picture in .*images\.zip"):
        store.open("no.png")


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    whole = saved(picture((64, 64)), "JPEG")
    cases = {"half.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"hello"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("zipped.jpg", whole[: len(whole) // 2])
    store = PictureStore(tmp_path)
    for name in [*cases, "zipped.jpg"]:
        with pytest.raises(PictureError, match=f"^{name}: no readable picture"):
            store.open(name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "images.zip").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"images\.zip is no whole zip archive"):
        PictureStore(tmp_path / "other").find("a.jpg")


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_grey_of_16_bits_looks_as_the_same_picture_with_8(
    mode: str, kind: str, tmp_path: Path
) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (5, 6)).astype(np.uint8)
    deep = grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257  # 255 -> 65535
    (tmp_path / "deep").write_bytes(saved(Image.fromarray(deep), kind))
    expected = np.asarray(Image.fromarray(grey).convert("RGB"))
    assert np.array_equal(np.asarray(PictureStore(tmp_path).open("deep")), expected)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "deep")), expected)


def test_pictures_of_every_mode_come_as_rgb_and_upright(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
        (tmp_path / mode).write_bytes(saved(Image.new(mode, (6, 5)), kind))
        assert PictureStore(tmp_path).open(mode).mode == "RGB"
    lying = Image.new("RGB", (20, 10))
    lying.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "lying.png").write_bytes(saved(lying, exif=exif))
    upright = PictureStore(tmp_path).open("lying.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0) and upright.getpixel((5, 17)) == (0, 0, 0)
