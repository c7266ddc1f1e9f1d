"""Speed of special layers against a plain causal layer: ratios within one run.

    python -m benchmarks.alternating [--out benchmarks/results] [--device cpu|cuda] [--repeats 5]

A decoder layer of Qwen2-0.5B's dimensions in fp32, one row with two images of 730 tokens at T 2048
(of 400 at T 1024), forward and forward with backward, in turns. "eager" is what the original
program forces: additive masks and all attention weights in memory. Also the time of building both
masks once. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from rwkvtune.models.alternating.config import DECODER_CONFIGS
from rwkvtune.models.alternating.model import (
    LlavaQwenWithAlternatingAttnModel,
    LlavaQwenWithAlternatingCrossAttnModel,
)
from rwkvtune.models.alternating.variants import Variant

LAYER: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 1,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
CASES: dict[str, tuple[Variant, str, str]] = {
    "plain causal": ("alternating", "none", "split"),
    "alternating, split": ("alternating", "first_k:1", "split"),
    "alternating, boolean mask": ("alternating", "first_k:1", "sdpa"),
    "alternating, eager": ("alternating", "first_k:1", "eager"),
    "alternating_cross, boolean mask": ("alternating_cross", "first_k:1", "sdpa"),
    "alternating_cross, eager": ("alternating_cross", "first_k:1", "eager"),
}
TOKENS_PER_IMAGE = {1024: 400, 2048: 730}


def make_layer(variant: Variant, schedule: str, attention: str, device: str) -> Any:
    """A decoder of one layer."""
    config: Any = DECODER_CONFIGS[variant](**LAYER)
    config.mask_schedule = schedule
    config._attn_implementation = attention
    kinds: dict[str, Any] = {
        "alternating": LlavaQwenWithAlternatingAttnModel,
        "alternating_cross": LlavaQwenWithAlternatingCrossAttnModel,
    }
    torch.manual_seed(0)
    return kinds[variant](config).to(device)


def sample(length: int, device: str) -> torch.Tensor:
    """Modality ids [1, T]: text, an image, text, an image, text."""
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    image = TOKENS_PER_IMAGE[length]
    gap = (length - 2 * image) // 3
    for start in (gap, 2 * gap + image):
        ids[:, start : start + image] = 1
    return ids


def measure(length: int, device: str, repeats: int) -> dict[str, Any]:
    """Medians of every case at one length, and their ratios to a plain layer."""
    ids = sample(length, device)
    torch.manual_seed(0)
    embeddings = torch.randn(1, length, LAYER["hidden_size"], device=device)
    layers = {name: make_layer(*case, device) for name, case in CASES.items()}

    def forward(layer: Any) -> Callable[[], object]:
        def work() -> object:
            with torch.no_grad():
                return layer(inputs_embeds=embeddings, modality_ids=ids, use_cache=False)

        return work

    def both(layer: Any) -> Callable[[], object]:
        def work() -> None:
            out = layer(inputs_embeds=embeddings, modality_ids=ids, use_cache=False)
            out.last_hidden_state.sum().backward()

        return work

    found: dict[str, Any] = {"T": length, "visual_share": round(float(ids.float().mean()), 3)}
    for name, kind in (("forward", forward), ("forward_backward", both)):
        works = {case: kind(layer) for case, layer in layers.items()}
        medians = interleaved(works, device, repeats)
        plain = medians["plain causal"]
        found[name] = {
            case: {"ms": round(ms, 1), "to_plain": round(ms / plain, 2)}
            for case, ms in medians.items()
        }
    masks: dict[str, Callable[[], object]] = {
        case: functools.partial(layer._masks, embeddings, None, ids, None)
        for case, layer in layers.items()
    }
    built = interleaved(masks, device, repeats)
    found["building_masks_ms"] = {case: round(ms, 2) for case, ms in built.items()}
    return found


def interleaved(
    works: dict[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, float]:
    """As machine.interleaved; on a CPU in milliseconds of this process, whatever else runs."""
    if device != "cpu":
        return machine.interleaved(works, device, repeats)
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if repeat:
                times[name].append((time.process_time() - began) * 1e3)
    return {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    result = machine.describe(options.device)
    result["lengths"] = []
    for length in TOKENS_PER_IMAGE:
        found = measure(length, options.device, options.repeats)
        print(json.dumps(found, indent=1), flush=True)
        result["lengths"].append(found)
    machine.write(options.out, f"alternating-{options.device}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
