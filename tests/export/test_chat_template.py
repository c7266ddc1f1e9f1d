"""Jinja templates against the text that the templates themselves write."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkvtune.data.chat import TEMPLATES, Message, Piece, load_template
from rwkvtune.data.chat_jinja import END_MARK, JinjaTemplate
from rwkvtune.export.chat_template import as_jinja

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be kind.\n\n \t\nAlways. \n\n"},
        {"role": "user", "content": "A list:\r\n\r\n- a\n\n\n- b  "},
        {"role": "assistant", "content": "<think>\n\nhm\n\n</think>\n\nGood day!\n  indented"},
        {"role": "tool", "content": "{'x': \"y\"}"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "It's\n\n{{ fine }}"},
    ],
]


def text_of(pieces: list[Piece]) -> str:
    return "".join(END_MARK if piece.text is None else piece.text for piece in pieces)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_transformers_writes_a_conversation_as_our_templates_do(
    name: str, messages: list[Message]
) -> None:
    chat_templates = pytest.importorskip("transformers.utils.chat_template_utils")
    template, source = TEMPLATES[name], as_jinja(TEMPLATES[name])
    assert source is not None
    for prompt, ours in ((False, template.pieces(messages)), (True, template.prompt(messages))):
        (text,), _ = chat_templates.render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=prompt, eos_token=END_MARK
        )
        if prompt and messages[-1]["role"] == "assistant":
            continue  # an answer after an answer
        assert text == text_of(ours)
        rendered = JinjaTemplate(source, "exported")
        again = rendered.prompt(messages) if prompt else rendered.pieces(messages)
        assert text == text_of(again)
        assert text_of([p for p in again if p.trained]) == text_of([p for p in ours if p.trained])


def test_a_jinja_template_goes_as_it_is(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(source)
    assert as_jinja(load_template(tmp_path / "t.jinja")) == source
