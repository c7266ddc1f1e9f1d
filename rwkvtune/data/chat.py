"""Conversations: the forms in which records hold them, and the text that a template makes of them.

A template cuts a conversation into pieces and says of each whether it is trained: `Piece.trained`
is the assistant mask, here and nowhere else. What the assistant said is trained together with what
ends its answer; everything else is context. The pieces are encoded one by one, so that no token
lies across a border of the mask, and a prompt has the same ids in training and in a chat.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write

Message = dict[str, Any]
"""`role` and `content`, both text. `weight` 0 on an answer of the assistant: it is not trained.
Other keys are kept for templates that read them."""

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "gpt_ignore", "chatgpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
    "system": "system",
}
"""What `from` says -> role."""

INSTRUCTIONS = ("instruction", "prompt", "question", "query")
RESPONSES = ("response", "output", "completion", "answer")
FORMS = (
    '{"messages": [{"role": ..., "content": ...}, ...]}, '
    '{"conversations": [{"from": ..., "value": ...}, ...]}, '
    '{"instruction": ..., "input": ..., "output": ...} or {"text": ...}'
)


class Piece(NamedTuple):
    """A part of a sample."""

    text: str | None
    """None = END_OF_DOCUMENT, which no text gives."""
    trained: bool
    """Its tokens are to be learned, not just read."""


def messages_of(record: object) -> list[Message] | str:
    """The conversation in a record, checked, or the text of one that is plain text.

    Of several forms in one record the first counts: messages, conversations, a pair of instruction
    and response (with input and system where they are), text. UserError says what cannot be used.
    """
    if not isinstance(record, dict):
        raise UserError(f"expected an object, one of {FORMS}")
    messages: list[Message]
    if record.get("messages") is not None:
        messages = [_message(m, i) for i, m in _numbered(record["messages"], "messages")]
    elif record.get("conversations") is not None:
        turns = _numbered(record["conversations"], "conversations")
        messages = [_sharegpt_message(turn, i) for i, turn in turns]
    elif (asked := _first_of(record, INSTRUCTIONS)) and (answer := _first_of(record, RESPONSES)):
        messages = _pair(record, asked, answer)
    elif isinstance(record.get("text"), str):
        if not record["text"].strip():
            raise UserError("text is empty")
        return str(record["text"])
    else:
        there = ", ".join(map(str, list(record)[:8])) or "none"
        raise UserError(f"no form of ours (its fields: {there}); expected {FORMS}")
    if record.get("system") and messages[0]["role"] != "system":
        messages.insert(0, _message({"role": "system", "content": record["system"]}, 0))
    check_messages(messages)
    return messages


def check_messages(messages: Sequence[Message]) -> None:
    """UserError unless the assistant says something that can be trained."""
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise UserError("a conversation without an assistant turn: nothing in it could be trained")
    if any(not m["content"].strip() and is_trained(m) for m in answers):
        raise UserError("an assistant turn is empty")
    if not any(is_trained(m) for m in answers):
        raise UserError("all assistant turns have weight 0: nothing in it could be trained")


def is_trained(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message.get("weight", 1))


def _numbered(value: object, key: str) -> list[tuple[int, object]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{key} is {_shown(value)}, expected a list of turns")
    return list(enumerate(value, start=1))


def _message(value: object, number: int) -> Message:
    """One turn in OpenAI's form."""
    if not isinstance(value, dict) or "role" not in value:
        raise UserError(
            f'turn {number} is {_shown(value)}, expected {{"role": ..., "content": ...}}'
        )
    role = value["role"]
    if role not in ROLES:
        raise UserError(f"turn {number} has the role {_shown(role)}: there are {', '.join(ROLES)}")
    weight = value.get("weight", 1)
    if weight not in (0, 1):
        raise UserError(f"turn {number} has the weight {_shown(weight)}, expected 0 or 1")
    content = value.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if content is None and value.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"turn {number} ({role}) has the content {_shown(content)}, expected text")
    if value.get("tool_calls"):
        content = _with_calls(content, value["tool_calls"], number)
    return {**value, "role": role, "content": content}


def _with_calls(content: str, calls: object, number: int) -> str:
    """What RWKV models write to call functions: JSON in a fenced block."""
    if not isinstance(calls, list):
        raise UserError(f"turn {number} has tool_calls {_shown(calls)}, expected a list")
    blocks = [content] if content else []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"turn {number} calls {_shown(call)}, expected a function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI writes them as a text that holds JSON
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise UserError(
                    f"turn {number} calls {function['name']} with {_shown(arguments)}, no JSON"
                ) from None
        written = {"name": function["name"], "arguments": arguments}
        blocks.append(f"```json\n{json.dumps(written, ensure_ascii=False)}\n```")
    return "\n".join(blocks)


def _sharegpt_message(turn: object, number: int) -> Message:
    if isinstance(turn, dict) and "role" in turn:
        return _message(turn, number)
    if not isinstance(turn, dict) or "from" not in turn:
        raise UserError(f'turn {number} is {_shown(turn)}, expected {{"from": ..., "value": ...}}')
    speaker = turn["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(
            f"turn {number} is from {_shown(speaker)}: there are {', '.join(SHAREGPT_ROLES)}"
        )
    message = _message({"role": role, "content": turn.get("value")}, number)
    weight = turn.get("weight", 0 if speaker == "gpt_ignore" else 1)
    return _message(message | {"weight": weight}, number)


def _pair(record: Mapping[str, Any], asked: str, answer: str) -> list[Message]:
    parts = {key: record.get(key) or "" for key in (asked, "input", answer)}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise UserError(f"{key} is {_shown(value)}, expected text")
    question = parts[asked]
    if parts["input"].strip():
        question += "\n" + parts["input"]
    if not question.strip():
        raise UserError(f"{asked} is empty")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": parts[answer]},
    ]


def _first_of(record: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class Template(Protocol):
    """How a conversation is written."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, besides END_OF_DOCUMENT; they are no part of it."""

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A whole conversation, ready to be trained."""

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation so far, up to where the assistant's next answer begins; nothing of it is
        trained."""

    def to_json(self) -> dict[str, Any]:
        """All that template_from_json needs to make the same one again."""


LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


@dataclass(frozen=True)
class RWKVTemplate:
    """`User: ...`, a blank line, `Assistant: ...`, as the released RWKV models were trained.

    System: You are kind.

    User: Hello

    Assistant: Good day!

    Blank lines inside a turn become line ends, since a blank line ends a turn. Source: BlinkDL's
    prompt formats for RWKV-7 G1 and for World models; they have no turn for a tool's result, which
    is written here as `Tool: ...`.
    """

    name: str
    keeps_blank_lines: bool
    """In answers (G1: a chain of thought has them). END_OF_DOCUMENT ends the last answer then; one
    that another turn follows ends with a blank line and the label of that turn."""

    @property
    def stops(self) -> tuple[str, ...]:
        if not self.keeps_blank_lines:
            return ("\n\n",)
        return tuple(f"\n\n{label}:" for role, label in LABELS.items() if role != "assistant")

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for i, message in enumerate(messages):
            text = self._text_of(message)
            label = LABELS[message["role"]] + ":"
            if message["role"] != "assistant":
                pieces.append(Piece(f"{label} {text}\n\n", False))
                continue
            trained = is_trained(message)
            is_last = i == len(messages) - 1
            pieces.append(Piece(label, False))
            if self.keeps_blank_lines and is_last:
                pieces += [Piece(f" {text}", trained), Piece(None, trained)]
            else:
                pieces.append(Piece(f" {text}\n\n", trained))
        return pieces

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        asked = [*messages, {"role": "assistant", "content": ""}]
        pieces = self.pieces(asked)
        label = max(i for i, piece in enumerate(pieces) if piece.text == LABELS["assistant"] + ":")
        return [Piece(piece.text, False) for piece in pieces[: label + 1]]

    def _text_of(self, message: Message) -> str:
        text = message["content"].replace("\r\n", "\n").strip()
        if message["role"] == "assistant" and self.keeps_blank_lines:
            return str(text)
        return re.sub(r"\n(?:[ \t]*\n)+", "\n", text)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.name}


TEMPLATES = {
    "g1": RWKVTemplate("g1", keeps_blank_lines=True),
    "world": RWKVTemplate("world", keeps_blank_lines=False),
}
_FILE_NAME = "template.json"


def load_template(spec: str | os.PathLike[str]) -> Template:
    """The template named by spec: `g1`, `world`, or a file: Jinja, or a run's template.json."""
    if spec in TEMPLATES:
        return TEMPLATES[str(spec)]
    path = Path(spec)
    if path.is_dir() and (path / _FILE_NAME).is_file():
        path /= _FILE_NAME
    if not path.is_file():
        raise MissingFileError(
            f"unknown template {str(spec)!r}: expected {', '.join(TEMPLATES)}, or the path of a "
            f"Jinja file or of a run's {_FILE_NAME}"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    if path.suffix != ".json":
        return template_from_json({"kind": "jinja", "source": content}, str(path))
    try:
        return template_from_json(json.loads(content), str(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def template_from_json(content: Any, where: str) -> Template:
    """The template whose to_json() gave this content; `where` it was found, for errors."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind in TEMPLATES:
        return TEMPLATES[kind]
    if kind == "jinja" and isinstance(content.get("source"), str):
        from rwkvtune.data.chat_jinja import JinjaTemplate

        return JinjaTemplate(content["source"], where)
    if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
        # What Hugging Face keeps beside a model: tokenizer_config.json.
        return template_from_json({"kind": "jinja", "source": content["chat_template"]}, where)
    raise UserError(
        f'{where}: no template of ours: expected {{"kind": "g1"}}, {{"kind": "world"}}, '
        '{"kind": "jinja", "source": ...} or {"chat_template": ...}'
    )


def save_template(template: Template, run_dir: str | os.PathLike[str]) -> None:
    """Keep the template in a run folder."""
    content = (json.dumps(template.to_json(), ensure_ascii=False, indent=1) + "\n").encode()
    atomic_write(Path(run_dir) / _FILE_NAME, lambda file: file.write(content))


def find_template(where: str | os.PathLike[str]) -> Template | None:
    """The template kept in a run folder, or beside a file in one (a checkpoint)."""
    folder = Path(where)
    if folder.is_file():
        folder = folder.parent
    path = folder / _FILE_NAME
    return load_template(path) if path.is_file() else None


def encoded(
    pieces: Sequence[Piece], encode: Callable[[str], Sequence[int]]
) -> tuple[list[int], list[bool]]:
    """Ids of all pieces in a row, and of each id whether it is trained."""
    from rwkvtune.data.tokenizers.base import END_OF_DOCUMENT

    ids: list[int] = []
    trained: list[bool] = []
    for text, is_trained_piece in pieces:
        more = [END_OF_DOCUMENT] if text is None else encode(text)
        ids += more
        trained += [is_trained_piece] * len(more)
    return ids, trained
