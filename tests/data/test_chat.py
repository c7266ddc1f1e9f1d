"""Records to conversations, conversations to ids and a mask: against lists written by hand and
against transformers' own rendering."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rwkvtune.data.chat import (
    Message,
    encoded,
    find_template,
    load_template,
    messages_of,
    save_template,
)
from rwkvtune.data.chat_jinja import END_MARK, JinjaTemplate
from rwkvtune.data.chat_samples import read_samples
from rwkvtune.data.tokenizers import ByteTokenizer, load_tokenizer
from rwkvtune.errors import MissingFileError, UserError

CHAT: list[Message] = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Hi\n\n\nyou"},
    {"role": "assistant", "content": "A\n\nB"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "C"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}\n  {%- if m.role == 'assistant' %}\n"
    "Bot: {% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}\n"
    "  {%- else %}\n{{ m.role | title }}: {{ m.content }}\n  {%- endif %}\n{%- endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)


def conversation(record: dict[str, Any]) -> list[Message]:
    found = messages_of(record)
    assert isinstance(found, list)
    return found


def bytes_and_mask(template: str, messages: list[Message]) -> tuple[list[int], list[bool]]:
    return encoded(load_template(template).pieces(messages), ByteTokenizer().encode)


def written(*parts: str | int) -> tuple[list[int], list[bool]]:
    """Ids and mask by hand: "+" before what is trained; a byte's id is its value + 1."""
    ids: list[int] = []
    mask: list[bool] = []
    for part in parts:
        text = "\0" if isinstance(part, int) else part
        trained = isinstance(part, int) or text.startswith("+")
        more = [0] if isinstance(part, int) else [b + 1 for b in text.removeprefix("+").encode()]
        ids += more
        mask += [trained] * len(more)
    return ids, mask


def test_g1_trains_answers_and_what_ends_them() -> None:
    assert bytes_and_mask("g1", CHAT) == written(
        "System: Be kind\n\nUser: Hi\nyou\n\nAssistant:", "+ A\n\nB\n\n",
        "User: 2\n\nAssistant:", "+ C", 0,
    )  # fmt: skip


def test_world_ends_every_answer_with_the_only_blank_line_in_it() -> None:
    assert bytes_and_mask("world", CHAT) == written(
        "System: Be kind\n\nUser: Hi\nyou\n\nAssistant:", "+ A\nB\n\n",
        "User: 2\n\nAssistant:", "+ C\n\n",
    )  # fmt: skip


def test_world_ids_are_those_of_the_published_vocabulary() -> None:
    """261 is "\\n\\n" there; the others were looked up in rwkv_vocab_v20230424.txt."""
    template, world = load_template("world"), load_tokenizer("world")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids, mask = encoded(template.pieces(messages), world.encode)
    assert ids == [24281, 59, 3880, 261, 5585, 41693, 59, 36786, 261]
    assert mask == [False] * 7 + [True] * 2


def test_an_answer_of_weight_zero_is_read_but_not_trained() -> None:
    messages = [dict(m) for m in CHAT]
    messages[2]["weight"] = 0
    ids, mask = bytes_and_mask("g1", messages)
    assert ids == bytes_and_mask("g1", CHAT)[0]
    assert sum(mask) == len(" C") + 1


@pytest.mark.parametrize("template", ["g1", "world"])
def test_a_prompt_is_the_beginning_of_what_was_trained(template: str) -> None:
    loaded = load_template(template)
    whole, _ = encoded(loaded.pieces(CHAT), ByteTokenizer().encode)
    prompt, mask = encoded(loaded.prompt(CHAT[:4]), ByteTokenizer().encode)
    assert prompt == whole[: len(prompt)] and not any(mask)
    assert bytes(b - 1 for b in prompt).endswith(b"User: 2\n\nAssistant:")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"role": "user", "content": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "response": "A"},
        {"prompt": "Q", "completion": "A"},
        {"question": "Q", "answer": "A", "text": "not this"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
                      {"role": "assistant", "content": "A"}]},
    ],
)  # fmt: skip
def test_every_form_of_a_record_gives_the_same_conversation(record: dict[str, Any]) -> None:
    found = conversation(record)
    assert [(m["role"], m["content"]) for m in found] == [("user", "Q"), ("assistant", "A")]


def test_inputs_systems_tools_and_ignored_turns_are_kept() -> None:
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Calculate"}
    found = conversation(alpaca)
    assert [m["content"] for m in found] == ["Calculate", "Add\n1 2", "3"]
    call = {"id": "x", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three"},
    ]
    ids, mask = bytes_and_mask("g1", conversation({"messages": turns}))
    called = '```json\n{"name": "add", "arguments": {"a": 1}}\n```'
    assert (ids, mask) == written(
        "User: 1+2\n\nAssistant:", f"+ {called}\n\n", "Tool: 3\n\nAssistant:", "+ Three", 0
    )
    ignored = {"conversations": [{"from": "human", "value": "Q"},
                                 {"from": "gpt_ignore", "value": "A"},
                                 {"from": "gpt", "value": "B"}]}  # fmt: skip
    assert [m.get("weight", 1) for m in conversation(ignored)] == [1, 0, 1]


def test_plain_text_is_a_document_between_two_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n')
    samples, _ = read_samples(
        str(path), ByteTokenizer(), load_template("g1"), ctx_len=3, on_bad_sample="error"
    )
    inputs, targets, trained = samples.shifted(0)
    assert inputs.tolist() == [0, 98, 99] and targets.tolist() == [98, 99, 0] and trained.all()


BAD = {
    '{"messages": [': "not JSON",
    '{"messages": [{"role": "bot", "content": "x"}]}': 'turn 1 has the role "bot": there are '
    "system, user, assistant, tool",
    '{"messages": [{"role": "user", "content": "x"}]}': "without an assistant turn",
    '{"conversations": [{"from": "alien", "value": "x"}]}': 'from "alien": there are human',
    '{"messages": []}': "expected a list of turns",
    '{"messages": [{"role": "assistant", "content": 5}]}': "the content 5, expected text",
    '{"instruction": "x", "output": ""}': "an assistant turn is empty",
    '{"title": "x"}': "no form of ours (its fields: title)",
    "[1]": "expected an object",
    json.dumps({"text": "x" * 200}): "201 tokens, more than ctx_len 64: raise --ctx_len",
    '{"text": " "}': "text is empty",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_or_by_choice_skipped_and_counted(line: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    good = '{"instruction": "Q", "output": "A"}\n'
    path.write_text(good + "\n" + line + "\n" + good + line + "\n")
    read = partial(read_samples, str(path), ByteTokenizer(), load_template("g1"), ctx_len=64)
    with pytest.raises(UserError) as caught:
        read(on_bad_sample="error")
    assert str(caught.value).startswith(f"{path}: line 3: ") and BAD[line] in str(caught.value)
    assert "\n" not in str(caught.value)
    samples, skipped = read(on_bad_sample="skip")
    assert len(samples) == 2 and len(skipped) == 2
    assert samples.places == [f"{path}: line 1", f"{path}: line 4"]
    [told] = skipped.lines()
    assert told.startswith("skipped 2 samples: ") and f"{path}: line 3, {path}: line 5" in told


def test_a_file_without_a_usable_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"title": "x"}\n')
    with pytest.raises(UserError, match=r"no usable sample in it: skipped 1 sample: no form"):
        read_samples(
            str(path), ByteTokenizer(), load_template("g1"), ctx_len=64, on_bad_sample="skip"
        )


def transformers_spans(source: str, messages: list[Message]) -> tuple[str, list[list[int]]]:
    """What transformers renders, and where its assistant mask has ones."""
    from transformers.utils.chat_template_utils import render_jinja_template

    found: Any = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        return_assistant_tokens_mask=True,
        bos_token=END_MARK,
        eos_token=END_MARK,
    )
    rendered, spans = found
    return rendered[0], [list(span) for span in spans[0]]


def ours(source: str, messages: list[Message]) -> tuple[str, list[list[int]]]:
    text, spans = "", list[list[int]]()
    for piece in JinjaTemplate(source, "test").pieces(messages):
        begin, text = len(text), text + (END_MARK if piece.text is None else piece.text)
        if piece.trained and spans and spans[-1][1] == begin:
            spans[-1][1] = len(text)
        elif piece.trained:
            spans.append([begin, len(text)])
    return text, spans


def test_a_jinja_template_with_marks_gives_the_text_and_mask_that_transformers_gives() -> None:
    expected = transformers_spans(MARKED, CHAT)
    assert len(expected[1]) == 2
    assert ours(MARKED, CHAT) == expected


def test_a_jinja_template_without_marks_gives_transformers_text_and_trains_the_answers() -> None:
    from transformers import ByT5Tokenizer

    text = ByT5Tokenizer().apply_chat_template(CHAT, chat_template=CHATML, tokenize=False)
    found, spans = ours(CHATML, CHAT)
    assert found == text
    assert [found[b:e] for b, e in spans] == ["A\n\nB<|im_end|>\n", "C<|im_end|>\n"]
    ignored = [CHAT[0], CHAT[1], CHAT[2] | {"weight": 0}, *CHAT[3:]]
    assert ours(CHATML, ignored) == (text, spans[1:])
    template = JinjaTemplate(CHATML, "test")
    assert template.stops == ("<|im_end|>",)
    prompt = "".join(p.text or "" for p in template.prompt(CHAT[:4]))
    assert prompt == text[: spans[1][0]]


def test_marks_that_a_template_may_not_find_in_a_text_are_refused() -> None:
    with pytest.raises(UserError, match="marks of the template"):
        JinjaTemplate(CHATML, "test").pieces([*CHAT, {"role": "user", "content": END_MARK}])


def test_a_template_whose_answers_cannot_be_told_says_what_to_do() -> None:
    last_only = "{{ messages[-1].content }}"
    with pytest.raises(UserError, match=r"put \{% generation %\}"):
        JinjaTemplate(last_only, "last.jinja").pieces(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "line 1"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages.x.y }}", "refuses this"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_errors_of_a_template_name_its_file(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        JinjaTemplate(source, "chat.jinja").pieces(CHAT)
    assert "chat.jinja" in str(caught.value)


def test_a_run_folder_keeps_its_template(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    for template in (load_template("world"), JinjaTemplate(CHATML, "test")):
        save_template(template, tmp_path)
        (tmp_path / "rwkv-final.pth").touch()
        for place in (tmp_path, tmp_path / "rwkv-final.pth"):
            found = find_template(place)
            assert found is not None and found.pieces(CHAT) == template.pieces(CHAT)
    with pytest.raises(MissingFileError, match="expected g1, world, or the path"):
        load_template(str(tmp_path / "none.jinja"))
