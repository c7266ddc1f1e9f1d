"""Checkpoints in the local cache of the Hugging Face hub, or fetched into it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import cached_file

OPTIONAL_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def repository_folder(name: str, *, allow_download: bool, config_only: bool = False) -> Path | None:
    """The folder of a repository's newest files; None where it is not to be had.

    allow_download: fetch what the cache lacks. config_only: config.json alone is enough.
    """

    def one(file_name: str) -> str | None:
        try:
            found: str | None = cached_file(
                name,
                file_name,
                local_files_only=not allow_download,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError):  # no such repository, or no name of one
            return None
        return found

    config = one("config.json")
    if config is None:
        return None
    if allow_download and not config_only:
        for file_name in OPTIONAL_FILES:
            path = one(file_name)
            if path and file_name.endswith(".index.json"):
                weights = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
                for shard in sorted(set(weights.values())):
                    one(shard)
    return Path(config).parent
