"""What a language model is trained and validated on: one token file, or a mixture of several."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rwkvtune.data.binidx import BinIdx
from rwkvtune.data.lm_dataset import LMDataset
from rwkvtune.data.mixture import MixedDataset, Source, parse_sources
from rwkvtune.data.sampler import PublishedOrder, RandomOrder, SampleOrder, ShuffledOrder
from rwkvtune.data.tokenizers import (
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from rwkvtune.errors import UserError
from rwkvtune.training.config import TrainConfig
from rwkvtune.training.log import PER_SOURCE
from rwkvtune.training.plan import Plan

FINGERPRINT_TOKENS = 2**19


@dataclass(frozen=True)
class LMData:
    dataset: LMDataset | MixedDataset
    training: Sequence[BinIdx]
    """One, or those of a mixture in the order of the dataset's parts."""
    validation: Sequence[BinIdx]
    """None, one or several."""
    validation_weights: Sequence[float] | None
    """For the mean over several; None = by their tokens."""
    tokenizer: Tokenizer | None
    ctx_len: int
    order: str

    def check(self, vocab_size: int) -> None:
        """UserError for an id that the model has no row for, and for validation data that nothing
        could be measured on."""
        for file in self.training:
            file.check_ids(vocab_size)
        if self.tokenizer is not None:  # it tells the bytes of each validated token
            vocab_size = min(vocab_size, self.tokenizer.vocab_size)
        for file in self.validation:
            if len(file) < 2:
                raise UserError(f"{file.bin_path}: one token is too little to validate on")
            file.check_ids(vocab_size)

    @property
    def validation_columns(self) -> list[str]:
        """Columns of metrics.csv for the losses of several sources, in their order."""
        if len(self.validation) < 2:
            return []
        names = [os.path.basename(file.prefix) for file in self.validation]
        if len(set(names)) < len(names):
            names = [file.prefix for file in self.validation]
        return [PER_SOURCE + name for name in names]

    @property
    def fingerprint(self) -> str:
        """Tells other training data under the same names, and the same under others: lengths,
        checksums over both ends, and shares in a mixture."""
        parts = [_fingerprint(file) for file in self.training]
        if isinstance(self.dataset, MixedDataset):
            parts = [f"{s:.9g} of {p}" for s, p in zip(self.dataset.shares, parts, strict=True)]
        return "; ".join(parts)

    @property
    def validation_fingerprint(self) -> str:
        """The same of the validation data."""
        parts = [_fingerprint(file) for file in self.validation]
        if self.validation_weights:
            parts = [f"{w} x {p}" for w, p in zip(self.validation_weights, parts, strict=True)]
        return "; ".join(parts)

    def num_slots(self, global_bsz: int) -> int:
        return self.dataset.num_slots

    @property
    def row_tokens(self) -> int:
        return self.ctx_len

    def save_beside(self, folder: Path) -> None:
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    def in_words(self, plan: Plan) -> list[tuple[str, str]]:
        num_samples = plan.total_steps * plan.global_bsz
        return [
            ("data", f"{self.training_in_words()}, order {self.order}"),
            ("validation", self.validation_in_words()),
            ("passes over data", self.passes_in_words(num_samples)),
        ]

    def training_in_words(self) -> str:
        files = [f"{file.prefix}: {len(file):,} tokens" for file in self.training]
        if isinstance(self.dataset, MixedDataset):
            files = [f"{100 * s:g} % {f}" for s, f in zip(self.dataset.shares, files, strict=True)]
        return "; ".join(files)

    def validation_in_words(self) -> str:
        files = [f"{len(file):,} tokens" for file in self.validation]
        if len(files) > 1:
            files = [f"{f.prefix}: {t}" for f, t in zip(self.validation, files, strict=True)]
        return "; ".join(files) or "none"

    def passes_in_words(self, num_samples: int) -> str:
        """How often a run of so many windows reads each file."""
        if isinstance(self.dataset, LMDataset):
            return f"{num_samples / self.dataset.num_slots:.2f}"
        return "; ".join(
            f"{file.prefix} {num_samples * share / part.num_slots:.2f}"
            for file, share, part in zip(
                self.training, self.dataset.shares, self.dataset.parts, strict=True
            )
        )


def open_data(config: TrainConfig, notes: list[str]) -> LMData:
    """Open all token files; UserError for what cannot be read as the settings say."""
    d = config.data
    sources = parse_sources(d.data_file)
    training = [BinIdx(source.prefix) for source in sources]
    weights = _weights(sources)
    if d.magic_prime and (d.order != "published" or weights):
        reason = f"order={d.order}" if d.order != "published" else "a mixture"
        raise UserError(f"magic_prime={d.magic_prime} has no meaning for {reason}: leave it out")
    parts = [
        LMDataset(file.tokens, _order(config, file), d.ctx_len, d.reset_at_documents)
        for file in training
    ]
    validation_sources = parse_sources(d.val_data_file) if d.val_data_file else []
    validation_weights = [float(s.weight) for s in validation_sources if s.weight is not None]
    return LMData(
        MixedDataset(parts, weights) if weights else parts[0],
        training,
        [BinIdx(source.prefix) for source in validation_sources],
        validation_weights or None,
        load_tokenizer(d.tokenizer) if d.tokenizer else _common_tokenizer(training),
        d.ctx_len,
        d.order,
    )


def _fingerprint(file: BinIdx) -> str:
    tail, head = file.tokens[-FINGERPRINT_TOKENS:], file.tokens[:FINGERPRINT_TOKENS]
    crc = zlib.crc32(head.tobytes(), zlib.crc32(tail.tobytes()))
    return f"{len(file)} tokens, crc32 {crc:08x}"


def _weights(sources: Sequence[Source]) -> list[Fraction]:
    """Of a mixture; empty for a single file."""
    if len(sources) == 1:
        return []
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        names = ",".join(f"{source.prefix}:{1 / len(sources):.2g}" for source in sources)
        raise UserError(f"data_file: give each of several token files a weight, such as {names}")
    return weights


def _order(config: TrainConfig, file: BinIdx) -> SampleOrder:
    d = config.data
    if d.order == "published":
        return PublishedOrder(len(file), d.ctx_len, d.magic_prime)
    seeded = ShuffledOrder if d.order == "shuffled" else RandomOrder
    return seeded(len(file), d.ctx_len, config.output.random_seed)


def _common_tokenizer(files: Sequence[BinIdx]) -> Tokenizer | None:
    """The one kept beside the files; UserError when they were made with different ones."""
    kept = {file.prefix: found for file in files if (found := find_tokenizer(file.prefix))}
    first, *others = kept or [""]
    for prefix in others:
        if kept[prefix].to_json() != kept[first].to_json():
            raise UserError(
                f"{first} was made with the tokenizer {kept[first].name} and {prefix} with another "
                f"({kept[prefix].name}): a mixture needs one; make the token files again with it"
            )
    return kept.get(first)
