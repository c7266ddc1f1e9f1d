"""Files of the true formats, scaled down, on which the published vision command runs as printed."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

MODEL = "models/rwkv7-g1c-2.9b-20251231-ctx8192.pth"
ENCODER = "encoders/siglip2-so400m-patch14-384"
DATA = "datasets/LLaVA-CC3M-Pretrain-595K"
"""Names in the published command."""

SIDE = 42
INSTRUCTIONS = (
    "Describe the image concisely.", "What is this?", "Give a brief description of the image.",
)  # fmt: skip
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}


def write_fixture(
    folder: Path, *, samples: int = 48, n_layer: int = 2, n_embd: int = 64, vocab_size: int = 65536
) -> None:
    """Write a tiny x070 model, a tiny SigLIP and a LLaVA-format data set under the names that the
    published command uses. Half of the pictures lie in the folder, half in images.zip."""
    import torch

    from rwkvtune.checkpoint import save_weights
    from rwkvtune.models import RWKV7Config, build_model
    from rwkvtune.models.vision.tiny import save_siglip, tiny_siglip

    model = build_model(RWKV7Config(vocab_size, n_layer, n_embd), seed=1)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # as they begin, blocks add nothing: there is nothing to learn
                parameter.normal_(std=0.5 * n_embd**-0.5, generator=random)
    save_weights(folder / MODEL, model.state_dict(), dtype="bf16")
    save_siglip(tiny_siglip(side=SIDE), folder / ENCODER, side=SIDE)
    _write_data(folder / DATA, samples)


def _write_data(folder: Path, samples: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = list(COLOURS)
    records = []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(samples):
            name, colour = f"GCC_train_{number:09d}.jpg", names[number % len(names)]
            pixels = np.array(COLOURS[colour]) + random.integers(-20, 20, (48, 64, 3))
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG")
            if number % 2:
                archive.writestr(name, file.getvalue())
            else:
                (folder / name).write_bytes(file.getvalue())
            instruction = INSTRUCTIONS[int(random.integers(len(INSTRUCTIONS)))]
            before = random.random() < 0.5
            asked = f"<image>\n{instruction}" if before else f"{instruction}\n<image>"
            records.append(
                {
                    "id": name.removesuffix(".jpg"),
                    "image": name,
                    "conversations": [
                        {"from": "human", "value": asked},
                        {"from": "gpt", "value": f"a {colour} wall in the sun"},
                    ],
                }
            )
    (folder / "chat.json").write_text(json.dumps(records), encoding="utf-8")
