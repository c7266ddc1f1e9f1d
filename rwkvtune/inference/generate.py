"""Text from a model, token by token, with a state of constant size."""

from __future__ import annotations

import codecs
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT, Tokenizer
from rwkvtune.errors import UserError
from rwkvtune.inference.sampling import sample
from rwkvtune.inference.settings import check_settings

PROMPT_CHUNK = 1024
"""Tokens of a prompt that the model reads at once: memory stays the same for any prompt."""


def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    banned_ids: Collection[int] = (),
    state: Any = None,
) -> Iterator[int]:
    """Give the tokens that follow a prompt, each as soon as it is chosen.

    prompt_ids: an empty prompt means END_OF_DOCUMENT, after which a new document starts.
    state: what the model returned for the text before the prompt; it is not changed.
    temperature, top_k, top_p, penalties: see `sample`; the penalties count generated tokens only.
    seed: repeats the choice on one kind of device; None draws from torch's global generator.
    stop_ids: tokens that end the text and are not given out.
    banned_ids: tokens that are never chosen, such as those that stand for no text.
    The model runs in eval mode without gradients; between two tokens it is as it was before.
    UserError, at the call, for settings or prompt ids that make no sense.
    """
    check_settings(
        temperature,
        top_k,
        top_p,
        presence_penalty,
        frequency_penalty,
        max_tokens=max_tokens,
        seed=seed,
    )
    prompt = list(prompt_ids) or [END_OF_DOCUMENT]
    vocab_size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(
            f"the prompt has token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
            f"{vocab_size - 1}: encode it with the tokenizer that the model was trained with"
        )
    device = next(model.parameters()).device
    generator = None
    if seed is not None:
        generator = torch.Generator(device).manual_seed(seed)
    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "generator": generator,
    }
    banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=device)
    counts = None
    if presence_penalty or frequency_penalty:
        counts = torch.zeros(1, vocab_size, device=device)

    def tokens() -> Iterator[int]:
        carried, ids = state, prompt
        for _ in range(max_tokens):
            logits, carried = read_prompt(model, torch.tensor([ids], device=device), carried)
            logits = logits.index_fill(1, banned, -math.inf) if len(banned) else logits
            id = int(sample(logits, counts=counts, **settings))  # type: ignore[arg-type]
            if id in stop_ids:
                return
            if counts is not None:
                counts[0, id] += 1
            yield id
            ids = [id]

    return tokens()


def stream_text(
    tokenizer: Tokenizer, ids: Iterable[int], *, errors: str = "replace"
) -> Iterator[str]:
    """Give the text of tokens as they come, a character only when all of its bytes are there.

    errors: what bytes that are not UTF-8, and half a character at the end, become: "replace" =
    U+FFFD, "surrogateescape" = what encodes to the same bytes again.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
    for id in ids:
        if text := decoder.decode(tokenizer.decode_bytes([id])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def until(pieces: Iterable[str], stops: Collection[str]) -> Iterator[str]:
    """Give the pieces of a text up to the first of the stop texts, which is left out.

    What may be the beginning of a stop is held back until the next pieces decide. Once a stop is
    complete no further piece is asked for.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            held = held[: min(found)]
            break
        begun = max(
            (n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0
        )
        if ready := held[: len(held) - begun]:
            yield ready
        held = held[len(held) - begun :]
    if held:
        yield held


def read(model: nn.Module, ids: Sequence[int], state: Any = None) -> Any:
    """The state after the tokens, which come after `state`; that one is not changed."""
    device = next(model.parameters()).device
    return read_prompt(model, torch.tensor([list(ids)], device=device), state)[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards."""
    was_training = [module for module in model.modules() if module.training]
    try:
        for module in was_training:
            module.training = False
        # Not inference_mode: what its tensors touch could not be trained afterwards.
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def read_prompt(model: nn.Module, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    """ids [1, T] -> logits after the last one [1, V] fp32, and the state there."""
    logits = ids
    with evaluating(model):
        for part in ids.split(PROMPT_CHUNK, dim=1):
            logits, state = model(part, state, head=_last_logits)
    return logits.float(), state


def _last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """hidden [B, T, C], head weight [V, C] -> logits of the last token only, [B, V]."""
    return F.linear(hidden[:, -1], head_weight.to(hidden.dtype))
