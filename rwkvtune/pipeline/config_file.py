"""configs/config.json of a work_dir: all that a new pipeline needs to go on with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkvtune.data.tokenizers import Tokenizer, tokenizer_from_json
from rwkvtune.data.tokenizers.generic import GenericTokenizer
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import atomic_write
from rwkvtune.pipeline.config import DataConfig, ModelConfig, TrainingConfig, config_from_json

CONFIG_FILE = Path("configs", "config.json")
"""In the work_dir, and beside it what JSON should not hold:"""
VOCABULARY_FILE = Path("data", "vocab.txt")


@dataclass
class Dataset:
    """The token files that are trained on."""

    prefix: str
    total_tokens: int
    num_sequences: int
    magic_prime: int | None
    exit_tokens: int
    val_prefix: str | None = None
    val_tokens: int | None = None


def write_config(
    work_dir: Path,
    *,
    model: ModelConfig,
    training: TrainingConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    dataset: Dataset | None,
    more: Mapping[str, Any],
) -> None:
    """Write the file, and the tokenizer's vocabulary if it has one of its own."""
    files = None
    if dataset is not None:
        files = dataclasses.asdict(dataset)
        for name in ("prefix", "val_prefix"):
            if files[name] and Path(files[name]).is_relative_to(work_dir):
                # A folder that is moved takes its data along.
                files[name] = str(Path(files[name]).relative_to(work_dir))
    content = {
        "model": dataclasses.asdict(model),
        "training": dataclasses.asdict(training),
        "data": dataclasses.asdict(data),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer_facts(tokenizer),
        "dataset": files,
        **more,
    }
    if content["tokenizer"]["kind"] == "vocab":
        tokenizer.save_vocab(work_dir / VOCABULARY_FILE)
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(work_dir / CONFIG_FILE, lambda file: file.write(text.encode()))


def read_config(work_dir: Path) -> dict[str, Any]:
    """What write_config has stored, but the tokenizer as tokenizer_facts; empty when there is
    none."""
    path = work_dir / CONFIG_FILE
    if work_dir.is_file():
        raise UserError(f"work_dir={work_dir} is a file: give a folder, existing or new")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no configuration of a pipeline")
    kinds: dict[str, Any] = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}
    configs = {
        name: config_from_json(kind, content[name], str(path))
        for name, kind in kinds.items()
        if name in content
    }
    files = content.get("dataset")
    dataset = None if files is None else _dataset_from_json(files, work_dir)
    return {**content, **configs, "dataset": dataset}


def _dataset_from_json(content: Any, work_dir: Path) -> Dataset:
    path = work_dir / CONFIG_FILE
    try:
        dataset = Dataset(**content)
        dataset.prefix = str(work_dir / dataset.prefix)
        if dataset.val_prefix:
            dataset.val_prefix = str(work_dir / dataset.val_prefix)
    except TypeError as error:
        raise UserError(f"{path}: dataset: {error}") from None
    if not Path(dataset.prefix + ".idx").exists():
        raise MissingFileError(
            f"{path} names the token files {dataset.prefix}.bin and .idx, which are not there: put "
            "them back, or remove `dataset` from that file and prepare the data again"
        )
    return dataset


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tells a tokenizer from another and makes it again, with a vocabulary's checksum in place
    of its lines."""
    facts = tokenizer.to_json()
    if "lines" in facts:
        facts["sha256"] = hashlib.sha256("\n".join(facts.pop("lines")).encode()).hexdigest()
    return facts


def stored_tokenizer(work_dir: Path, facts: Any) -> Tokenizer:
    """The tokenizer that a work_dir was made with."""
    where = str(work_dir / CONFIG_FILE)
    kind = facts.get("kind") if isinstance(facts, dict) else None
    if kind == "custom":
        raise UserError(
            f"{where}: this pipeline was made with a tokenizer of your class "
            f"{facts.get('class')}: give tokenizer=..."
        )
    if kind != "vocab":
        return tokenizer_from_json(facts, where)
    path = work_dir / VOCABULARY_FILE
    found = GenericTokenizer(path, facts.get("vocab_size", 0))
    if tokenizer_facts(found) != facts:
        raise UserError(f"{path} is not the vocabulary that {where} tells of: put that one back")
    return found
