"""The join of pictures and words, against concatenation; the pixel shuffle, element by element."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.vision.config import AdapterConfig
from rwkvtune.models.vision.model import (
    Adapter,
    VisionLanguageModel,
    labelled_rows,
    pixel_shuffled,
)


class Eye(nn.Module):
    """Two tokens of width 8 per picture."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float().flatten(1)[:, :16].view(-1, 2, 8)


def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    llm = build_model(RWKV7Config(50, 2, 64), seed=0)
    with torch.no_grad():
        for p in llm.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return VisionLanguageModel(llm, Eye(), Adapter(AdapterConfig(8, 64, 16)))


def test_pictures_in_front_are_a_concatenation_and_elsewhere_a_replacement() -> None:
    m = model()
    pixels = torch.arange(2 * 48).view(2, 3, 4, 4).to(torch.uint8)
    words = torch.randint(1, 50, (2, 5))
    places = torch.zeros(2, 7, dtype=torch.bool)
    places[:, :2] = True
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), words], dim=1)
    seen = m.adapter(m.encoder(pixels))
    expected, _ = m.llm(inputs_embeds=torch.cat([seen, m.llm.emb(words)], dim=1))
    found, _ = m(ids, image_positions=places, pixels=pixels)
    torch.testing.assert_close(found, expected)

    places = torch.zeros(1, 7, dtype=torch.bool)
    places[0, 1:3] = places[0, 4:5] = True
    x = m.llm.emb(ids[:1]).clone()
    x[0, 1], x[0, 2], x[0, 4] = seen[0, 0], seen[0, 1], seen[1, 1]
    expected, _ = m.llm(inputs_embeds=x)
    rows = torch.tensor([0, 1, 3])
    found, _ = m(ids[:1], image_positions=places, image_rows=rows, pixels=pixels)
    torch.testing.assert_close(found, expected)


def test_text_alone_is_the_language_model_and_still_reaches_the_adapter() -> None:
    """Every rank of a distributed run needs gradients of every trained tensor."""
    m = model()
    ids = torch.randint(1, 50, (2, 6))
    nowhere = torch.zeros(2, 6, dtype=torch.bool)
    empty = torch.zeros(0, 3, 4, 4, dtype=torch.uint8)
    found, _ = m(ids, image_positions=nowhere, pixels=empty)
    torch.testing.assert_close(found, m.llm(ids)[0])
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in m.adapter.parameters())


def test_a_pixel_shuffle_lays_squares_of_neighbours_side_by_side() -> None:
    x = torch.arange(16.0).view(1, 16, 1)  # a square of 4 x 4, row by row
    assert pixel_shuffled(x, 2).tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    ]
    two = torch.stack([torch.arange(4.0), torch.arange(4.0) + 10], dim=-1)[None]
    assert pixel_shuffled(two, 2).tolist() == [[[0, 10, 1, 11, 2, 12, 3, 13]]]


def test_only_rows_with_a_target_reach_the_head() -> None:
    hidden = torch.arange(24.0).view(2, 3, 4)
    targets = torch.tensor([[-100, 7, -100], [8, -100, 9]])
    rows, wanted = labelled_rows(hidden, targets, -100)
    assert wanted.tolist() == [7, 8, 9]
    assert rows.tolist() == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]]
