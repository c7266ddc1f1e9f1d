"""A conversation with a model, whose state is kept between turns and on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkvtune.data.chat import Message, Template, encoded, template_from_json
from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write
from rwkvtune.inference.generate import generate, read, stream_text, until
from rwkvtune.inference.tokenizer import without_text
from rwkvtune.models.layers import LayerState, State

STATE_FORMAT = "rwkvtune chat state 1"


@dataclass(frozen=True)
class ChatSettings:
    """How an answer is chosen; see `generate`."""

    max_tokens: int = 500
    temperature: float = 1.0
    top_p: float = 0.3
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


def answer(
    model: nn.Module,
    tokenizer: Tokenizer,
    template: Template,
    prompt_ids: Sequence[int],
    settings: ChatSettings,
    *,
    state: State | None = None,
) -> Iterator[str]:
    """Give the pieces of what the model answers, up to what ends an answer in this template.

    prompt_ids: up to where the answer begins.  state: what the model returned before them.
    """
    vocab_size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = generate(
        model,
        prompt_ids,
        state=state,
        stop_ids=(END_OF_DOCUMENT,),
        banned_ids=without_text(tokenizer, vocab_size),
        **vars(settings),
    )
    has_begun = False
    for piece in until(stream_text(tokenizer, ids), template.stops):
        if shown := piece if has_begun else piece.lstrip():
            has_begun = True
            yield shown


@dataclass
class Chat:
    """Asks the model, and keeps what was said.

    What the model has read is kept as a state: a new turn costs its own tokens and those of the
    answer before, however long the conversation is.
    """

    model: nn.Module
    tokenizer: Tokenizer
    template: Template
    messages: list[Message] = field(default_factory=list)
    """So far; a system message may stand first."""
    _read: list[int] = field(default_factory=list)
    """Ids that the state comes from."""
    _state: State | None = None

    def reply(self, question: str, settings: ChatSettings) -> Generator[str, None, None]:
        """The pieces of the answer as they come; both turns are then part of the conversation.

        Ended early (the iterator is closed, or Ctrl-C), what came so far is the answer.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt, _ = encoded(self.template.prompt(asked), self.tokenizer.encode)
        self._catch_up(prompt[:-1])
        pieces = answer(
            self.model, self.tokenizer, self.template, prompt[-1:], settings, state=self._state
        )
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said.strip()}]

    def _catch_up(self, ids: list[int]) -> None:
        """Read `ids`, only what is new where they begin with what was read before."""
        known = len(self._read)
        if ids[:known] != self._read:
            known, self._state = 0, None
        if ids[known:]:
            self._state = read(self.model, ids[known:], self._state)
        self._read = ids

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self._read, self._state = [], None

    def save(self, path: Path) -> None:
        """Write conversation and state into a .safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors = {"ids": torch.tensor(self._read, dtype=torch.int64)}
        for i, layer in enumerate(self._state or []):
            for name, tensor in layer._asdict().items():
                tensors[f"blocks.{i}.{name}"] = tensor.detach().cpu().clone()
        meta = {
            "format": STATE_FORMAT,
            "model": fingerprint(self.model),
            "tokenizer": _digest(json.dumps(self.tokenizer.to_json()).encode()),
            "template": json.dumps(self.template.to_json(), ensure_ascii=False),
            "messages": json.dumps(self.messages, ensure_ascii=False),
        }
        content = save(tensors, meta)
        atomic_write(path, lambda file: file.write(content))

    def load(self, path: Path) -> None:
        """Go on with a conversation that `save` wrote, with its template.

        UserError, and nothing has changed, for another file, another model's or tokenizer's, and
        for one that is damaged.
        """
        meta, tensors = _read_state_file(path)
        for what, now in (
            ("model", fingerprint(self.model)),
            ("tokenizer", _digest(json.dumps(self.tokenizer.to_json()).encode())),
        ):
            if meta.get(what) != now:
                raise UserError(
                    f"{path} was saved with another {what} ({meta.get(what)}, this one is {now}): "
                    "a state means nothing to other weights; load it with the ones it was made with"
                )
        ids = tensors.pop("ids").tolist()
        state = _state_from(tensors, self.model, path) if ids else None
        device = next(self.model.parameters()).device
        try:
            messages = json.loads(meta["messages"])
            template = template_from_json(json.loads(meta["template"]), str(path))
        except (KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged: its conversation is missing ({error})") from None
        self.messages, self.template = messages, template
        self._read = ids
        self._state = state and [LayerState(*(t.to(device) for t in layer)) for layer in state]


def fingerprint(model: nn.Module) -> str:
    """Tells one model's weights from another's, also after a little training: version, sizes, and a
    digest over the beginning of each tensor in bf16, the same for every type they are kept in."""
    config: Any = model.config
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        head = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
        digest.update(name.encode() + head.view(torch.uint8).numpy().tobytes())
    return f"{config.version} L{config.n_layer} D{config.n_embd} {digest.hexdigest()}"


def _read_state_file(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no chat state, or damaged: {error}") from None
    if meta.get("format") != STATE_FORMAT or "ids" not in tensors:
        raise UserError(
            f"{path} is no chat state of this version: expected the format {STATE_FORMAT!r}, found "
            f"{meta.get('format', 'none')!r}"
        )
    return meta, tensors


def _state_from(tensors: dict[str, torch.Tensor], model: nn.Module, path: Path) -> State:
    c: Any = model.config
    heads = (1, c.num_heads, c.head_size, c.head_size)
    shapes = {"att_shift": (1, c.n_embd), "wkv": heads, "ffn_shift": (1, c.n_embd)}
    state: State = []
    for i in range(c.n_layer):
        layer = {}
        for name, shape in shapes.items():
            found = tensors.get(f"blocks.{i}.{name}")
            if found is None or tuple(found.shape) != shape:
                has = "is missing" if found is None else f"is {list(found.shape)}"
                raise UserError(f"{path}: blocks.{i}.{name} {has}, this model needs {list(shape)}")
            layer[name] = found
        state.append(LayerState(**layer))
    return state


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
