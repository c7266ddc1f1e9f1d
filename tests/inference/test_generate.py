"""Generation against full forward passes of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkvtune.data.tokenizers import ByteTokenizer
from rwkvtune.errors import UserError
from rwkvtune.inference import generate as module
from rwkvtune.inference.generate import generate, stream_text, until
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.rwkv7.model import RWKV7

VOCAB = 31
PROMPT = [5, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture
def model() -> RWKV7:
    """A model whose every part matters: at their initial values, blocks add nothing."""
    model = build_model(RWKV7Config(VOCAB, 2, 32, head_size=16), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    assert isinstance(model, RWKV7)
    return model


def continue_greedily(model: RWKV7, prompt: list[int], count: int) -> list[int]:
    """The witness: the whole text again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits, _ = model(torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_equals_the_full_forward_pass(model: RWKV7) -> None:
    found = list(generate(model, PROMPT, max_tokens=20, temperature=0))
    assert found == continue_greedily(model, PROMPT, 20)
    assert len(set(found)) > 3  # else the comparison would say little


def test_a_prompt_longer_than_a_chunk_gives_the_same_text(
    model: RWKV7, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROMPT_CHUNK", 4)
    found = list(generate(model, PROMPT, max_tokens=12, temperature=0))
    assert found == continue_greedily(model, PROMPT, 12)


def test_an_empty_prompt_starts_a_new_document(model: RWKV7) -> None:
    found = list(generate(model, [], max_tokens=5, temperature=0))
    assert found == continue_greedily(model, [0], 5)


def test_a_state_stands_for_the_text_before_the_prompt_and_may_be_used_again(model: RWKV7) -> None:
    with torch.no_grad():
        _, state = model(torch.tensor([PROMPT[:6]]))
    for _ in range(2):
        found = list(generate(model, PROMPT[6:], max_tokens=8, temperature=0, state=state))
        assert found == continue_greedily(model, PROMPT, 8)


def test_each_token_costs_one_step_and_a_state_of_the_same_size(model: RWKV7) -> None:
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: tuple[Tensor, Any], output: tuple[Tensor, Any]) -> None:
        seen.append((args[0].shape[1], sum(t.numel() for layer in output[1] for t in layer)))

    model.register_forward_hook(note)
    list(generate(model, PROMPT, max_tokens=30))
    assert [tokens for tokens, _ in seen] == [len(PROMPT)] + [1] * 29
    assert len({size for _, size in seen}) == 1


def test_a_seed_repeats_the_text_and_leaves_the_global_generator_alone(model: RWKV7) -> None:
    torch.manual_seed(0)
    first = list(generate(model, PROMPT, max_tokens=20, seed=7))
    torch.rand(3)
    assert list(generate(model, PROMPT, max_tokens=20, seed=7)) == first
    assert list(generate(model, PROMPT, max_tokens=20, seed=8)) != first
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(generate(model, PROMPT, max_tokens=3, seed=7))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_token_ends_the_text_and_is_not_given_out(model: RWKV7) -> None:
    whole = list(generate(model, PROMPT, max_tokens=20, temperature=0))
    stop = whole[4]
    found = list(generate(model, PROMPT, max_tokens=20, temperature=0, stop_ids={stop}))
    assert found == whole[: whole.index(stop)]


def test_a_large_presence_penalty_lets_no_token_come_twice(model: RWKV7) -> None:
    ids = generate(model, PROMPT, max_tokens=VOCAB, temperature=0, presence_penalty=1e6)
    assert sorted(ids) == list(range(VOCAB))


def test_banned_tokens_never_come_however_likely(model: RWKV7) -> None:
    whole = list(generate(model, PROMPT, max_tokens=12, temperature=0))
    banned = set(whole)
    found = list(generate(model, PROMPT, max_tokens=12, temperature=0, banned_ids=banned))
    first, _ = model(torch.tensor([PROMPT]))
    allowed = [id for id in range(VOCAB) if id not in banned]
    assert found[0] == allowed[int(first[0, -1, allowed].argmax())]
    for seed in range(3):
        options: dict[str, Any] = {
            "temperature": 3.0,
            "top_p": 0.99,
            "top_k": 30,
            "frequency_penalty": 0.5,
        }
        ids = generate(model, PROMPT, max_tokens=50, seed=seed, banned_ids=banned, **options)
        assert not banned & set(ids)


def test_between_two_tokens_the_model_is_as_it_was_and_can_be_trained_afterwards(
    model: RWKV7,
) -> None:
    model.train()
    model.blocks[1].eval()  # frozen parts keep a mode of their own
    modes = [m.training for m in model.modules()]
    inside: list[bool] = []
    model.register_forward_hook(lambda *_: inside.append(model.training))
    ids = generate(model, PROMPT, max_tokens=5)
    next(ids)
    assert inside == [False]
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    del ids  # left in the middle
    logits, _ = model(torch.tensor([PROMPT]))
    logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "ffn" in n)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([5, VOCAB], {}, f"from 5 to {VOCAB}, the model knows 0 to {VOCAB - 1}"),
        ([-1], {}, "from -1"),
        ([1], {"top_p": 2.0}, "top_p is 2.0"),
        ([1], {"max_tokens": -1}, "max_tokens is -1"),
        ([1], {"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_bad_input_is_refused_at_the_call(
    model: RWKV7, prompt: list[int], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompt, **({"max_tokens": 1} | arguments))


def one_by_one(ids: list[int], log: list[int]) -> Iterator[int]:
    for id in ids:
        log.append(id)
        yield id


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_streamed_text_is_the_text_and_never_half_a_character(text: str) -> None:
    tokenizer = ByteTokenizer()
    taken: list[int] = []
    shown = ""
    for piece in stream_text(tokenizer, one_by_one(tokenizer.encode(text), taken)):
        shown += piece
        assert shown == tokenizer.decode(taken) == text[: len(shown)]  # nothing is held back
    assert shown == text


def test_a_text_that_ends_inside_a_character_shows_a_replacement() -> None:
    tokenizer = ByteTokenizer()
    assert list(stream_text(tokenizer, tokenizer.encode("aé")[:-1])) == ["a", "\ufffd"]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=30))
def test_streamed_bytes_that_are_no_utf8_come_back_exactly(content: bytes) -> None:
    ids = [byte + 1 for byte in content]
    pieces = list(stream_text(ByteTokenizer(), ids, errors="surrogateescape"))
    assert b"".join(piece.encode("utf-8", "surrogateescape") for piece in pieces) == content


PIECES = st.lists(st.text("ab", max_size=3), max_size=12)


@settings(max_examples=300, deadline=None)
@given(PIECES, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_goes_up_to_the_first_stop_and_no_further_piece_is_asked_for(
    pieces: list[str], stops: list[str]
) -> None:
    taken: list[str] = []

    def one_by_one() -> Iterator[str]:
        for piece in pieces:
            taken.append(piece)
            yield piece

    found = list(until(one_by_one(), stops))
    # The witness looks at the whole text again after every piece.
    for n in range(len(pieces) + 1):
        text = "".join(pieces[:n])
        places = [text.index(stop) for stop in stops if stop in text]
        if places:
            text = text[: min(places)]
            break
    assert "".join(found) == text
    assert len(taken) == n


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    pieces = iter(["a\n", "b", "\n", "\n"])
    text = until(pieces, ["\n\n"])
    assert next(text) == "a"
    assert next(text) == "\nb"
    assert list(text) == []
