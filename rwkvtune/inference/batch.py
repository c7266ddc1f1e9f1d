"""Text from a model for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT
from rwkvtune.inference.generate import evaluating, read_prompt
from rwkvtune.inference.sampling import sample
from rwkvtune.models.layers import LayerState, State


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    is_finished: Callable[[int, Sequence[int]], bool],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, without the END_OF_DOCUMENT that may end them.

    is_finished: told a prompt's number and its tokens so far after each new one, says whether they
    are enough.  temperature, top_k, top_p: see `sample`.  banned_ids: never chosen.
    Prompts are read one by one, since padding would change their states; then all go on together,
    and those that are finished leave.
    """
    device = next(model.parameters()).device
    banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    read = [
        read_prompt(model, torch.tensor([list(ids) or [END_OF_DOCUMENT]], device=device), None)
        for ids in prompts
    ]
    if not read:
        return written
    logits = torch.cat([row for row, _ in read])
    state: State = [
        LayerState(*(torch.cat(parts) for parts in zip(*layers, strict=True)))
        for layers in zip(*(state for _, state in read), strict=True)
    ]
    active = list(range(len(prompts)))
    for _ in range(max_tokens):
        logits = logits.index_fill(1, banned, -torch.inf)
        ids: Any = sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        stay = []
        for row, (prompt, id) in enumerate(zip(active, ids.tolist(), strict=True)):
            if id == END_OF_DOCUMENT:
                continue
            written[prompt].append(id)
            if not is_finished(prompt, written[prompt]):
                stay.append(row)
        if not stay:
            break
        if len(stay) < len(active):
            rows = torch.tensor(stay, device=device)
            state = [LayerState(*(part[rows] for part in layer)) for layer in state]
            ids, active = ids[rows], [active[row] for row in stay]
        with evaluating(model):
            logits, state = model(ids[:, None], state)
        logits = logits[:, -1].float()
    return written
