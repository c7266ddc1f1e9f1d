"""From weights in any form that we read to any form that we write, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvtune.checkpoint import save_dtype, write_pth, write_safetensors
from rwkvtune.data.tokenizers import Tokenizer, as_json, data_tokenizer_path
from rwkvtune.errors import UserError
from rwkvtune.export import FORMATS, huggingface, llama_cpp
from rwkvtune.export.chat_template import as_jinja
from rwkvtune.export.hf_tokenizer import tokenizer_files
from rwkvtune.export.source import TUNED_STATE, Source
from rwkvtune.export.web_rwkv import to_web_rwkv
from rwkvtune.files import atomic_directory, atomic_write, atomic_write_together, check_space
from rwkvtune.models import RWKV7Config

_HEADER_BYTES = 4 << 20  # more than the names and the vocabulary of any file take


class Exported(NamedTuple):
    path: Path
    num_bytes: int
    """Of the tensors."""
    notes: list[str]
    """What was left out or made, and why."""


def export_weights(
    source: Source,
    out: Path,
    to: str,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    shard_bytes: int = huggingface.SHARD_BYTES,
) -> Exported:
    """Write the weights in the form `to`, a key of FORMATS, whole or not at all.

    dtype: fp32, bf16, fp16, for gguf also q8_0; None keeps what is there (.st is always fp16).
    tokenizer: goes where the form holds one; with .pth and .safetensors it is kept beside the file.
    overwrite: may replace a file, or a folder that has the form of a Hugging Face model.
    shard_bytes: size of the files of a Hugging Face folder, at most.
    UserError for what the form cannot hold, before anything is written, save values beyond fp16.
    """
    check_request(source.path, out, to, dtype=dtype, overwrite=overwrite)
    config = source.config
    if config.version not in FORMATS[to].versions:
        raise UserError(
            f"{source.path} is {config.version}; {to} holds {' and '.join(FORMATS[to].versions)} "
            f"only ({FORMATS[to].readers} read it): export to "
            + ", ".join(name for name, form in FORMATS.items() if config.version in form.versions)
        )
    tuned = [name for name in source.weights if name.endswith(TUNED_STATE)]
    if tuned and to not in ("pth", "safetensors"):
        raise UserError(
            f"{source.path} holds a tuned initial state ({tuned[0]}, ...), which {to} has no "
            "defined place for: export to pth or safetensors"
        )
    notes = []
    if to in ("hf", "gguf") and tokenizer is None:
        notes.append("no tokenizer is known for these weights: none was written")
    elif to == "hf" and tokenizer is not None and not tokenizer_files(tokenizer):
        notes.append(
            f"the tokenizer {tokenizer.name} is none that transformers can be told of: it was kept "
            "for rwkvtune only"
        )
    if to == "gguf" and tokenizer is not None and not _covers_all_bytes(tokenizer):
        blank = "put a blank after each number, the last one too"
        notes.append(
            f"the tokenizer {tokenizer.name} does not cover every text, and llama.cpp (2026-10) "
            "never comes back from one that it does not cover"
            + (f": {blank}" if tokenizer.name in ("integers", "angles") else "")
        )
    if to == "hf" and config.n_layer == 1:
        notes.append(
            "flash-linear-attention 0.6.0 cannot load a model of one layer (its initial values "
            "divide by the number of layers - 1)"
        )
    if to == "hf":
        num_bytes = _write_folder(source, out, dtype, tokenizer, shard_bytes)
    elif to == "gguf":
        tensors = llama_cpp.to_gguf(source.weights, config)
        num_bytes = llama_cpp.stored_bytes(tensors, config, dtype)
        check_space(out, num_bytes + _HEADER_BYTES)
        atomic_write(
            out,
            lambda file: llama_cpp.write(
                file,
                tensors,
                config,
                name=out.stem,
                dtype=dtype,
                tokenizer=tokenizer,
                template=source.template,
            ),
        )
    elif to == "st":
        tensors = to_web_rwkv(source.weights, config)
        num_bytes = _stored_bytes(tensors, torch.float16)
        check_space(out, num_bytes + _HEADER_BYTES)
        atomic_write(out, lambda file: write_safetensors(file, tensors, torch.float16))
    else:
        num_bytes = _write_upstream(source.weights, out, to, save_dtype(dtype), tokenizer)
    return Exported(out, num_bytes, notes)


def check_request(
    source: Path, out: Path, to: str, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """UserError for what cannot be asked for, told before the weights are opened."""
    form = FORMATS[to]
    if dtype is not None and dtype not in form.dtypes:
        raise UserError(f"{to} cannot hold {dtype}: choose {' or '.join(form.dtypes)}")
    if form.suffix and out.suffix != form.suffix:
        raise UserError(f"{out}: the name of a {to} file ends in {form.suffix}")
    if not form.suffix and out.suffix in {f.suffix for f in FORMATS.values() if f.suffix}:
        raise UserError(f"{out}: {to} is a folder, its name does not end in {out.suffix}")
    if not out.exists():
        return
    if source.exists() and os.path.samefile(source, out):
        raise UserError(f"{out} is the source itself: choose another name")
    if form.suffix and out.is_dir():
        raise UserError(f"{out} is a folder, {to} is a file: choose another name")
    if not overwrite:
        raise UserError(f"{out} is there already: choose another name, or give --overwrite")
    if not form.suffix and any(out.iterdir()) and not huggingface.is_hf_folder(out):
        raise UserError(
            f"{out} is a folder without a config.json, so no earlier export, and is not replaced: "
            "choose another name"
        )


def _covers_all_bytes(tokenizer: Tokenizer) -> bool:
    tokens = (tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size))
    return len({token for token in tokens if len(token) == 1}) == 256


def _write_folder(
    source: Source,
    out: Path,
    dtype: str | None,
    tokenizer: Tokenizer | None,
    shard_bytes: int,
) -> int:
    config = source.config
    assert isinstance(config, RWKV7Config)
    target = save_dtype(dtype)
    tensors = huggingface.to_hf(source.weights, config)
    num_bytes = _stored_bytes(tensors, target)
    check_space(out, num_bytes + _HEADER_BYTES)
    with atomic_directory(out) as folder:
        huggingface.write(
            folder,
            tensors,
            config,
            name=out.name,
            source=source.path.name,
            dtype=target,
            tokenizer=tokenizer,
            chat_template=as_jinja(source.template) if source.template else None,
            shard_bytes=shard_bytes,
        )
    return num_bytes


def _write_upstream(
    weights: Mapping[str, Tensor],
    out: Path,
    to: str,
    dtype: torch.dtype | None,
    tokenizer: Tokenizer | None,
) -> int:
    num_bytes = _stored_bytes(weights, dtype)
    check_space(out, num_bytes + _HEADER_BYTES)
    write = write_pth if to == "pth" else write_safetensors
    writes = {out: lambda file: write(file, weights, dtype)}
    if tokenizer is not None and tokenizer.name not in ("world", "custom"):
        content = as_json(tokenizer)
        writes[data_tokenizer_path(out)] = lambda file: file.write(content)
    atomic_write_together(writes)
    return num_bytes


def _stored_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors.values())
