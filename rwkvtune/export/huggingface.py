"""Folders in the layout of flash-linear-attention's RWKV7 for Hugging Face transformers.

Names and shapes are those of its module RWKV7ForCausalLM (0.6.0); tests/golden/fla-rwkv7.json holds
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvtune import __version__
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.data.tokenizers import (
    END_OF_DOCUMENT,
    Tokenizer,
    as_json,
    load_tokenizer,
)
from rwkvtune.data.tokenizers.world import vocabulary_path
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.export.hf_tokenizer import OWN_TOKENIZER, WORLD_VOCABULARY, tokenizer_files
from rwkvtune.models import ModelConfig, RWKV7Config
from rwkvtune.models.rwkv7.config import UNUSED

SHARD_BYTES = 5_000_000_000
"""As huggingface_hub splits files unless told otherwise."""
_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"

_OUTER = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_MODULES = {
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.ln_x": "attn.g_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "ffn.key": "ffn.key",
    "ffn.value": "ffn.value",
}
_LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_LETTERS = "rwkvag"
# Name within a block -> name within a layer.
_IN_BLOCK = (
    {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in _MODULES.items()
        for part in (("weight", "bias") if "ln" in ours else ("weight",))
    }
    | {f"att.x_{letter}": f"attn.x_{letter}" for letter in _LETTERS}
    | {f"att.{name}": f"attn.{name}" for name in ("k_k", "k_a", "r_k")}
    | {
        f"att.{letter}{number}": f"attn.{letter}_lora.lora.{theirs}"
        for letter in "wavg"
        for number, theirs in _LOW_RANK.items()
        if letter + number != "g0"  # the gate has no bias
    }
    | {"ffn.x_k": "ffn.x_k"}
)
_TRANSPOSED = re.compile(r"att\.[wavg][12]")

# transformers runs this file when it is told to trust the folder's code; without it, `import fla`
# does the same.
_MODELING = '''"""RWKV-7 of flash-linear-attention, by the names that config.json gives."""

from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM, RWKV7Model
'''


def to_hf(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of an x070 model by their names and in their layouts, views of the same memory.
    The first block's v0, v1, v2, which nothing reads, are left out."""
    if config.head_size != 64:
        raise UserError(
            "flash-linear-attention derives the eps of ln_x from the head size, here "
            f"{config.head_size}, and would give other results than training did unless that is "
            "64: export to another format"
        )
    found = {}
    for name, tensor in weights.items():
        if name in UNUSED:
            continue
        if name in _OUTER:
            found[_OUTER[name]] = tensor
            continue
        _, layer, part = name.split(".", 2)
        if _TRANSPOSED.fullmatch(part):
            tensor = tensor.mT
        elif part.startswith("att.x_"):
            tensor = tensor.reshape(1, 1, -1)
        elif part != "att.r_k" and tensor.squeeze().dim() == 1:
            tensor = tensor.reshape(-1)
        found[f"model.layers.{layer}.{_IN_BLOCK[part]}"] = tensor
    return found


def from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by upstream's names; vectors are [C]. Raises KeyError for an unknown name."""
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    in_block = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
    found = {}
    for theirs, tensor in tensors.items():
        if theirs in outer:
            found[outer[theirs]] = tensor
            continue
        layer, part = re.sub(r"^model\.layers\.", "", theirs).split(".", 1)
        if part == "attn.x_x":  # all six in one, as some folders have them
            rows = zip(_LETTERS, tensor.reshape(6, -1), strict=True)
            found |= {f"blocks.{layer}.att.x_{letter}": row for letter, row in rows}
        else:
            ours = in_block[part]
            found[f"blocks.{layer}.{ours}"] = tensor.mT if _TRANSPOSED.fullmatch(ours) else tensor
    return found


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: RWKV7Config,
    *,
    name: str,
    source: str,
    dtype: torch.dtype | None,
    tokenizer: Tokenizer | None,
    chat_template: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fill a folder with weights, configuration, tokenizer and model card.

    tensors: as to_hf gives them.  dtype: to store them in, None = as they are.
    name, source: of the model and of the file that it comes from, for the card.
    chat_template: in Jinja, to go with the tokenizer.
    """
    shards = list(_shards(tensors, dtype, shard_bytes))
    names = [_ONE_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        total = sum(num_bytes for _, num_bytes in shards)
        weight_map = {
            tensor: file for file, (shard, _) in zip(names, shards, strict=True) for tensor in shard
        }
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, (shard, _) in zip(names, shards, strict=True):
        save_weights(folder / file, shard, dtype=dtype)
    stored = dtype or tensors["lm_head.weight"].dtype
    _write_json(folder / "config.json", configuration(config, stored))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_DOCUMENT)
    _write_json(folder / "generation_config.json", ids)
    (folder / "modeling_rwkv7.py").write_text(_MODELING, encoding="utf-8")
    if tokenizer is not None:
        for file, content in tokenizer_files(tokenizer, chat_template).items():
            (folder / file).write_text(content, encoding="utf-8")
        if tokenizer.name == "world":
            (folder / WORLD_VOCABULARY).write_bytes(vocabulary_path().read_bytes())
        else:
            (folder / OWN_TOKENIZER).write_bytes(as_json(tokenizer))
    card = model_card(config, name=name, source=source, dtype=stored, tokenizer=tokenizer)
    (folder / "README.md").write_text(card, encoding="utf-8")


def configuration(config: RWKV7Config, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json. Nothing is left to defaults, which fit no released model."""
    ratio = config.dim_ffn / config.n_embd
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_rwkv7.RWKV7Config",
            "AutoModel": "modeling_rwkv7.RWKV7Model",
            "AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM",
        },
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "hidden_ratio": ratio,
        "intermediate_size": config.dim_ffn,
        "num_hidden_layers": config.n_layer,
        "head_dim": config.head_size,
        "num_heads": config.num_heads,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.a_rank,
        "v_low_rank_dim": config.v_rank,
        "gate_low_rank_dim": config.g_rank,
        "value_dim": [config.n_embd] * config.n_layer,
        "hidden_act": "sqrelu",
        "attn": None,
        "attn_mode": "chunk",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "fuse_norm": False,
        "tie_word_embeddings": False,
        "bos_token_id": END_OF_DOCUMENT,
        "eos_token_id": END_OF_DOCUMENT,
        "pad_token_id": END_OF_DOCUMENT,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def model_card(
    config: RWKV7Config, *, name: str, source: str, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> str:
    ranks = f"decay {config.decay_rank}, a {config.a_rank}, v {config.v_rank}, gate {config.g_rank}"
    loads_tokenizer = tokenizer is not None and bool(tokenizer_files(tokenizer))
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- rwkv
- rwkv7
- flash-linear-attention
---

# {name}

An RWKV-7 (x070) language model, written by rwkvtune {__version__} from `{source}`.

| | |
| --- | --- |
| parameters | {config.num_parameters:,} |
| layers, width | {config.n_layer}, {config.n_embd} |
| heads | {config.num_heads} of {config.head_size} |
| channel mix | {config.dim_ffn} |
| low ranks | {ranks} |
| vocabulary | {config.vocab_size} rows{f", tokenizer {tokenizer.name}" if tokenizer else ""} |
| stored as | {str(dtype).removeprefix("torch.")} |

Token 0 ends a document, and a text is predicted best after one: put it before a prompt.

```python
import fla  # pip install flash-linear-attention
from transformers import AutoModelForCausalLM{", AutoTokenizer" * loads_tokenizer}

model = AutoModelForCausalLM.from_pretrained("{name}")
"""
    if loads_tokenizer:
        text += f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
    return text + "```\n"


def is_hf_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def read(folder: Path) -> tuple[dict[str, Tensor], Tokenizer | None]:
    """The tensors of a folder as upstream names them (vectors [C]), memory-mapped, and its
    tokenizer if it keeps one that we know. UserError for another model than RWKV7."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
        kind = content.get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if kind != "rwkv7":
        raise UserError(
            f"{folder} holds a model of the type {kind!r}; of Hugging Face folders only rwkv7, in "
            "flash-linear-attention's layout, can be read"
        )
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        tensors |= load_weights(path)
    try:
        weights = from_hf(tensors)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{folder} has the tensor {error}, which flash-linear-attention's RWKV7 does not have"
        ) from None
    for file in (WORLD_VOCABULARY, OWN_TOKENIZER):
        if (folder / file).is_file():
            return weights, load_tokenizer(folder / file)
    return weights, None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is no index of weights: {error}") from None
        return [folder / Path(name).name for name in names]
    if not (folder / _ONE_FILE).is_file():
        raise MissingFileError(f"{folder} has neither {_ONE_FILE} nor {_INDEX}.")
    return [folder / _ONE_FILE]


def _shards(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The tensors in their order, cut into parts of at most `limit` bytes, and the bytes of each;
    a tensor that is larger is a part of its own."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shard and size + num_bytes > limit:
            yield shard, size
            shard, size = {}, 0
        shard[name] = tensor
        size += num_bytes
    yield shard, size


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
