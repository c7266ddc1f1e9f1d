"""Weights of any form that we read, by upstream's names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvtune.checkpoint import load_weights
from rwkvtune.data.chat import Template, find_template
from rwkvtune.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from rwkvtune.errors import UserError
from rwkvtune.export import huggingface, llama_cpp
from rwkvtune.export.web_rwkv import from_web_rwkv
from rwkvtune.models import CONFIGS, ModelConfig, config_from_state_dict
from rwkvtune.models.dimensions import misfits
from rwkvtune.models.rwkv7.config import UNUSED
from rwkvtune.weights_header import first_bytes, newest_weights

TUNED_STATE = ".att.time_state"
"""End of the names of tensors that hold a tuned initial state, beside those of the model."""


class Source(NamedTuple):
    path: Path
    """The file, or the folder of Hugging Face's form."""
    format: str
    """A key of rwkvtune.export.FORMATS."""
    weights: dict[str, Tensor]
    """By upstream's names; memory-mapped."""
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    """The one that is kept with it."""
    template: Template | None = None
    """Of chats, kept with it."""


def open_source(path: Path) -> Source:
    """Weights of a .pth, .safetensors, .st or .gguf file, of a run folder (its newest), or of a
    Hugging Face folder in flash-linear-attention's layout.

    UserError when they are not, in full, a model of a version that rwkvtune trains.
    """
    if path.is_dir() and not huggingface.is_hf_folder(path):
        path = newest_weights(path)
    tokenizer: Tokenizer | None
    template = None
    if path.is_dir():
        kind = "hf"
        weights, tokenizer = huggingface.read(path)
    elif path.suffix.lower() == ".gguf":
        kind = "gguf"
        first_bytes(path)  # refuses what is not there
        weights, vocabulary = llama_cpp.read(path)
        tokenizer = _tokenizer_of(vocabulary, weights["emb.weight"].shape[0])
    else:
        kind = {".st": "st", ".safetensors": "safetensors"}.get(path.suffix.lower(), "pth")
        weights = load_weights(path)
        weights = from_web_rwkv(weights) if kind == "st" else weights
        tokenizer, template = find_tokenizer(path), find_template(path)
    return _checked(Source(path, kind, weights, _config_of(path, weights), tokenizer, template))


def _config_of(path: Path, weights: dict[str, Tensor]) -> ModelConfig:
    try:
        return config_from_state_dict(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _checked(source: Source) -> Source:
    """The same with upstream's shapes where another program's were given; UserError for what does
    not fit."""
    expected = CONFIGS[source.config.version].tensor_shapes(source.config)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in source.weights.items()
        if not name.endswith(TUNED_STATE)
    }
    odd = misfits(shapes, expected, UNUSED)
    odd += [
        f"not floating-point: {name} {tensor.dtype}"
        for name, tensor in source.weights.items()
        if not tensor.is_floating_point()
    ][:1]
    if odd:
        raise UserError(
            f"{source.path} does not fit an {source.config.version} model of its own dimensions; "
            f"{'; '.join(odd)}"
        )
    if source.format in ("pth", "safetensors"):
        return source
    weights = {}  # in upstream's order, too
    for name, shape in expected.items():
        tensor = source.weights.get(name)
        if tensor is None:  # one that nothing reads; RWKV-LM wants it to be there
            tensor = torch.zeros(shape, dtype=source.weights["blocks.0.att.a0"].dtype)
        weights[name] = tensor.reshape(shape)
    return source._replace(weights=weights)


def _tokenizer_of(vocabulary: dict[int, bytes], vocab_size: int) -> Tokenizer | None:
    if not vocabulary:
        return None
    from rwkvtune.data.tokenizers.integers import IntegerTokenizer
    from rwkvtune.data.tokenizers.vocabulary import VocabularyTokenizer

    if all(token == b"%d " % (id - 1) for id, token in vocabulary.items()):
        return IntegerTokenizer(len(vocabulary) - 1, padded_vocab_size=vocab_size)
    world = load_tokenizer("world")
    unused = {0, *world.unused_ids}
    known = {id: world.decode_bytes([id]) for id in range(world.vocab_size) if id not in unused}
    return world if vocabulary == known else VocabularyTokenizer(vocabulary, vocab_size)
