"""Chat templates in Jinja, as Hugging Face keeps them beside a model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rwkvtune.data.chat import Message, Piece, is_trained
from rwkvtune.errors import UserError

END_MARK = "<|rwkv_tokenizer_end_of_text|>"
"""What a template gets as bos_token and eos_token: it becomes END_OF_DOCUMENT. The name that RWKV's
Hugging Face tokenizers have for id 0."""

_BEGIN, _END = "\ue000", "\ue001"
"""Stand around what is generated, from rendering to cutting: private characters of Unicode."""

_SENTINEL = "\ue002"


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what is inside was said by the assistant.

    The block that Hugging Face has introduced for masks; its name is that of
    transformers.utils.chat_template_utils.AssistantTracker.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class JinjaTemplate:
    """A chat template in Jinja, rendered as transformers renders it.

    What is trained: the {% generation %} blocks where the template has them. Else what each answer
    adds to the conversation before it, up to the next turn; UserError for a template whose text of
    the conversation before is no beginning of the whole, since then nothing tells the answer.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source, self.where = source, where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where}: line {error.lineno}: {error.message}") from None
        self._marks_answers = bool(re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source))

    @property
    def stops(self) -> tuple[str, ...]:
        """What the template writes behind an answer."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        answer: Message = {"role": "assistant", "content": _SENTINEL}
        tail = self._render([*asked, answer]).rpartition(_SENTINEL)[2]
        tail = tail.replace(_END, "").partition(END_MARK)[0]
        return (tail.rstrip() or tail,) if tail else ()

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        text = self._render(messages)
        if self._marks_answers:
            return self._cut_at_marks(text, messages)
        return self._cut_at_answers(text, messages)

    def _cut_at_answers(self, text: str, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        done = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = self._render(messages[:i], add_generation_prompt=True)
            end = self._render(messages[: i + 1])
            if not (text.startswith(end) and end.startswith(begin)):
                raise UserError(
                    f"{self.where}: what it writes for turns 1 to {i + 1} is no beginning of what "
                    "it writes for the whole conversation, so the answer in it cannot be told: put "
                    "{% generation %} and {% endgeneration %} around it in the template"
                )
            pieces += _with_ends(text[done : len(begin)], False)
            pieces += _with_ends(text[len(begin) : len(end)], is_trained(message))
            done = len(end)
        return pieces + _with_ends(text[done:], False)

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        text = self._render(messages, add_generation_prompt=True)
        try:
            # The pieces of training, so that its ids are the same.
            cut = self._cut_at_marks if self._marks_answers else self._cut_at_answers
            pieces = cut(text, messages)
        except UserError:  # a template that rewrites the past
            pieces = _with_ends(re.sub(f"[{_BEGIN}{_END}]", "", text), False)
        return [Piece(piece.text, False) for piece in pieces]

    def _cut_at_marks(self, text: str, messages: Sequence[Message]) -> list[Piece]:
        answers = [m for m in messages if m["role"] == "assistant"]
        parts = text.split(_BEGIN)
        pieces = _with_ends(parts[0], False)
        if len(parts) - 1 != len(answers):
            raise UserError(
                f"{self.where}: {len(parts) - 1} generation blocks were written for "
                f"{len(answers)} assistant turns: each turn needs one"
            )
        for answer, part in zip(answers, parts[1:], strict=True):
            inside, _, behind = part.partition(_END)
            pieces += _with_ends(inside, is_trained(answer)) + _with_ends(behind, False)
        return pieces

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        for message in messages:
            marks = (END_MARK, _BEGIN, _END)
            if any(mark in message["content"] for mark in marks):
                raise UserError(
                    f"the text of a turn holds {END_MARK} or a private character of Unicode "
                    "(U+E000, U+E001), which would be taken for marks of the template"
                )
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=END_MARK,
                eos_token=END_MARK,
                tools=None,
                documents=None,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self.where}: the template refuses this: {error.message}") from None
        except (TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise UserError(f"{self.where}: the template fails on this: {error}") from None

    def to_json(self) -> dict[str, Any]:
        return {"kind": "jinja", "source": self.source}


def _with_ends(text: str, trained: bool) -> list[Piece]:
    """The text with its end marks as pieces of their own."""
    pieces: list[Piece] = []
    for i, part in enumerate(text.split(END_MARK)):
        if i:
            pieces.append(Piece(None, trained))
        if part:
            pieces.append(Piece(part, trained))
    return pieces


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
