"""Encoders: the features of transformers' own models, sizes from a dry run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rwkvtune.errors import UserError
from rwkvtune.inference.vision import open_encoder
from rwkvtune.models.vision import encoders
from rwkvtune.models.vision.tiny import save_siglip, tiny_siglip

SIDE = 28
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": 14,
}  # fmt: skip


def saved(kind: str, folder: Path) -> tuple[Any, Any]:
    """A tiny checkpoint of one kind on the disk, and transformers' own model and processor."""
    import transformers as t

    model: Any
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "siglip, both towers":
            text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "vocab_size": 99}  # fmt: skip
            model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=SIZES))
        elif kind == "siglip":
            model = tiny_siglip(side=SIDE)
        elif kind == "clip":
            model = t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES))
        else:
            sizes = {n: v for n, v in SIZES.items() if n != "intermediate_size"}
            model = t.Dinov2Model(t.Dinov2Config(**sizes))
    if kind.startswith("siglip"):
        save_siglip(model, folder, side=SIDE)
        processor: Any = t.SiglipImageProcessorPil.from_pretrained(folder)
    else:
        model.save_pretrained(folder)
        processor = t.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
        processor.save_pretrained(folder)
    return model.eval(), processor


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8))
        for i in range(count)
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "tokens"), [("siglip", 4), ("siglip, both towers", 4), ("clip", 5), ("dinov2", 5)]
)
def test_features_are_those_of_transformers_in_batches_of_any_size(
    kind: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, processor = saved(kind, tmp_path)
    encoder, preprocessing = open_encoder(str(tmp_path), "", torch.float32)
    assert (encoder.num_tokens, encoder.width) == (tokens, 32)
    seen = pictures(5)
    values = torch.from_numpy(np.stack(processor(seen, return_tensors="np")["pixel_values"]))
    tower = theirs.vision_model if kind == "siglip, both towers" else theirs
    with torch.no_grad():
        expected = tower(pixel_values=values).last_hidden_state
    pixels = torch.from_numpy(np.stack([preprocessing.pixels(picture) for picture in seen]))
    monkeypatch.setattr(encoders, "PICTURES_AT_ONCE", 2)
    found = encoder.train()(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad and not encoder.training
    assert encoder(pixels[:0]).shape == (0, tokens, 32)
    pooled = [n for n, _ in encoder.named_parameters() if "head" in n]
    assert not pooled, "SigLIP's pooling, which nobody reads, is not loaded"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved("siglip", tmp_path)
    open_encoder(str(tmp_path), "siglip2", torch.float32)  # the same kind by its other name
    for kind, reason in {
        "clip": "not clip: give --encoder_type siglip", "speech": "encodes speech", "x": "unknown",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=reason):
            open_encoder(str(tmp_path), kind, torch.float32)

    def change(file: str, **changes: Any) -> Path:
        path = tmp_path / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    change("preprocessor_config.json", size={"height": 42, "width": 28})
    with pytest.raises(UserError, match="does not take pictures of 42 x 28"):
        open_encoder(str(tmp_path), "", torch.float32)
    change("preprocessor_config.json", size={"height": SIDE, "width": SIDE})
    change("config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match="lacks 1[0-9] tensors of a siglip picture tower"):
        open_encoder(str(tmp_path), "", torch.float32)
    change("config.json", model_type="siglip2_vision_model")
    with pytest.raises(UserError, match="NaFlex"):
        open_encoder(str(tmp_path), "", torch.float32)
    change("config.json", model_type="bert")
    with pytest.raises(UserError, match="is a bert checkpoint"):
        open_encoder(str(tmp_path), "", torch.float32)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read"):
        open_encoder(str(tmp_path), "", torch.float32)


def test_a_fingerprint_tells_weights_and_preparation_apart(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_siglip(tiny_siglip(side=SIDE, seed=seed), tmp_path / name, side=SIDE)
    a, b, c = (open_encoder(str(tmp_path / n), "", torch.bfloat16)[0].fingerprint for n in "abc")
    assert a == b != c
    assert open_encoder(str(tmp_path / "a"), "", torch.float32)[0].fingerprint == a
    path = tmp_path / "b" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 3}))
    assert open_encoder(str(tmp_path / "b"), "", torch.float32)[0].fingerprint != a
