"""A chat's state against the whole conversation read anew, and what its files may be loaded by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvtune.data.chat import load_template
from rwkvtune.data.chat_jinja import JinjaTemplate
from rwkvtune.data.tokenizers import ByteTokenizer, CharTokenizer
from rwkvtune.errors import UserError
from rwkvtune.inference.chat import Chat, ChatSettings
from rwkvtune.models import CONFIG_CLASSES, build_model
from rwkvtune.models.frame import LanguageModel

GREEDY = ChatSettings(max_tokens=6, temperature=0.0)


def varied_model(version: str = "x070", seed: int = 2) -> LanguageModel:
    """At their initial values, blocks would add nothing."""
    model = build_model(CONFIG_CLASSES[version](vocab_size=257, n_layer=2, n_embd=64), seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
        model.head.weight[[*range(128, 257)]] = 0.0  # ASCII only: an answer is read as written
        model.head.weight[:33] = 0.0
        model.ln_out.bias.fill_(0.5)
    return model


def chat_with(model: LanguageModel, template: str = "world") -> Chat:
    return Chat(model, ByteTokenizer(), load_template(template))


def said(chat: Chat, *questions: str) -> list[str]:
    return ["".join(chat.reply(question, GREEDY)) for question in questions]


def greedily(model: LanguageModel, text: str, count: int) -> str:
    """The witness: the whole text read again for each byte."""
    ids = [b + 1 for b in text.encode()]
    begin = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return bytes(id - 1 for id in ids[begin:] if id).decode(errors="replace")


@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_each_answer_is_that_of_the_whole_conversation_written_out(version: str) -> None:
    model = varied_model(version)
    chat = chat_with(model)
    chat.messages = [{"role": "system", "content": "Be brief"}]
    text = "System: Be brief\n\n"
    for question in ("One", "Two", "Three"):
        [answer] = said(chat, question)
        text += f"User: {question}\n\nAssistant:"
        written = greedily(model, text, 6)
        assert answer == written.lstrip() and len(answer) > 2
        text += f" {answer.strip()}\n\n"
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief"}]
    assert said(chat, "One") == said(chat_with_system(model), "One")


def chat_with_system(model: LanguageModel) -> Chat:
    chat = chat_with(model)
    chat.messages = [{"role": "system", "content": "Be brief"}]
    return chat


def test_a_loaded_state_goes_on_as_the_chat_that_saved_it(tmp_path: Path) -> None:
    model, path = varied_model(), tmp_path / "talk.safetensors"
    chat = chat_with(model)
    said(chat, "One", "Two")
    chat.save(path)
    expected = said(chat, "Three")
    again = chat_with(model, "g1")
    again.load(path)
    assert again.messages == chat.messages[:4]
    assert again.template == chat.template, "a state is of its template"
    read: list[int] = []
    inner = model.forward

    def counting(ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        read.append(ids.shape[1])
        return inner(ids, *args, **kwargs)  # type: ignore[arg-type]

    model.forward = counting  # type: ignore[method-assign, assignment]
    assert said(again, "Three") == expected
    assert sum(read) < 50, "the turns before are in the state"


def test_an_answer_that_is_ended_early_is_kept_as_far_as_it_came() -> None:
    chat = chat_with(varied_model())
    pieces = chat.reply("One", GREEDY)
    first = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first.strip()}


def test_a_state_of_another_model_tokenizer_or_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    model = varied_model()
    chat = chat_with(model)
    said(chat, "One")
    chat.save(path)

    def refused(chat: Chat, file: Path = path) -> str:
        before = list(chat.messages)
        with pytest.raises(UserError) as caught:
            chat.load(file)
        assert chat.messages == before
        return str(caught.value)

    assert "saved with another model" in refused(chat_with(varied_model(seed=3)))
    assert "saved with another model" in refused(chat_with(varied_model("x060")))
    with torch.no_grad():
        model.blocks[1].ln1.bias[3] += 0.1  # type: ignore[union-attr, index, operator]
    assert "saved with another model" in refused(chat), "a little training makes another model"
    with torch.no_grad():
        model.blocks[1].ln1.bias[3] -= 0.1  # type: ignore[union-attr, index, operator]
    letters = CharTokenizer.from_text("abc")
    assert "another tokenizer" in refused(Chat(model, letters, load_template("world")))
    content = path.read_bytes()
    for name, bad in (("cut", content[:-100]), ("other", b"hello"), ("empty", b"")):
        damaged = tmp_path / name
        damaged.write_bytes(bad)
        assert "no chat state, or damaged" in refused(chat, damaged)
    assert "no such file" in refused(chat, tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"ids": torch.zeros(1)}, tmp_path / "foreign")
    assert "no chat state of this version" in refused(chat, tmp_path / "foreign")


def test_a_template_that_rewrites_the_past_is_read_from_the_beginning() -> None:
    """As those that leave the thoughts of earlier answers out."""
    source = (
        "{% for m in messages[-1:] %}Q: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    model = varied_model()
    chat = Chat(model, ByteTokenizer(), JinjaTemplate(source, "test"))
    said(chat, "One")
    fresh = Chat(model, ByteTokenizer(), JinjaTemplate(source, "test"))
    assert said(chat, "Two") == said(fresh, "Two")
