"""What a fine-tuning run is trained and validated on: conversations and how they are written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rwkvtune.checkpoint import load_weights
from rwkvtune.data.chat import Template, find_template, load_template, save_template
from rwkvtune.data.chat_batches import Batching, Row, rows_for
from rwkvtune.data.chat_samples import ChatSamples, Skipped, read_samples
from rwkvtune.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer, save_tokenizer
from rwkvtune.errors import UserError
from rwkvtune.inference.tokenizer import tokenizer_for
from rwkvtune.training.plan import Plan
from rwkvtune.training.sft_config import SFTConfig
from rwkvtune.training.starting_point import contents, preset_of, weights_named
from rwkvtune.weights_header import read_header


@dataclass(frozen=True)
class ChatData:
    name: str
    training: ChatSamples
    validation: ChatSamples | None
    tokenizer: Tokenizer
    template: Template
    ctx_len: int
    batching: Batching

    @cached_property
    def rows(self) -> list[Row]:
        return rows_for(self.training, ctx_len=self.ctx_len, batching=self.batching)

    def num_slots(self, global_bsz: int) -> int:
        return -(-len(self.rows) // global_bsz) * global_bsz

    @cached_property
    def row_tokens(self) -> int:
        return -(-int(self.training.lengths.sum()) // len(self.rows))

    @property
    def validation_columns(self) -> list[str]:
        return []

    @property
    def fingerprint(self) -> str:
        return self.training.fingerprint

    @property
    def validation_fingerprint(self) -> str:
        return self.validation.fingerprint if self.validation else ""

    def check(self, vocab_size: int) -> None:
        for samples in filter(None, (self.training, self.validation)):
            if (highest := int(samples.ids.max())) >= vocab_size:
                raise UserError(
                    f"{self.name} has the id {highest} with the tokenizer {self.tokenizer.name}, "
                    f"the model knows 0 to {vocab_size - 1}: give --tokenizer the one that it was "
                    "trained with"
                )

    def save_beside(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder)
        save_template(self.template, folder)

    def in_words(self, plan: Plan) -> list[tuple[str, str]]:
        passes = plan.total_steps * plan.global_bsz / self.num_slots(plan.global_bsz)
        filled = self.training.lengths.sum() / (len(self.rows) * self.ctx_len)
        rows = {
            "packed": f"in {len(self.rows):,} rows of {self.ctx_len}, {filled:.0%} full",
            "bucketed": f"each in a row of its own, at most {self.ctx_len}",
        }
        return [
            ("data", f"{self.name}: {self.training.in_words()}"),
            ("batching", f"{self.batching}: {rows[self.batching]}"),
            ("template", str(self.template.to_json()["kind"])),
            ("validation", self.validation.in_words() if self.validation else "none"),
            ("passes over data", f"{passes:.2f}"),
        ]


def open_data(config: SFTConfig, notes: list[str]) -> ChatData:
    """Read and encode all conversations; UserError for what cannot be read as the settings say."""
    d, folder = config.data, Path(config.output.proj_dir)
    if not (_weights(config) or config.model.n_layer or contents(folder)):
        raise UserError(
            "load_model is missing: give the weights to start from (.pth, .safetensors), a preset "
            "(model_config), or n_layer and n_embd for a fresh model"
        )
    tokenizer = _tokenizer(config, notes)
    template = _template(config)

    def samples_of(name: str) -> ChatSamples:
        samples, skipped = read(name, config, tokenizer, template)
        notes.extend(skipped.lines())
        return samples

    training, validation = samples_of(d.data_file), None
    if d.val_data_file:
        validation = samples_of(d.val_data_file)
        if d.val_share != type(d)().val_share:
            notes.append(f"val_share={d.val_share} does nothing with val_data_file")
    elif d.val_share:
        training, validation = training.divided(d.val_share, config.output.random_seed)
    return ChatData(d.data_file, training, validation, tokenizer, template, d.ctx_len, d.batching)


def read(
    name: str, config: SFTConfig, tokenizer: Tokenizer, template: Template
) -> tuple[ChatSamples, Skipped]:
    d = config.data
    return read_samples(name, tokenizer, template, ctx_len=d.ctx_len, on_bad_sample=d.on_bad_sample)


def samples_to_look_at(config: SFTConfig, notes: list[str]) -> tuple[ChatSamples, Tokenizer]:
    """The conversations as a run would train them; needs no weights, World is assumed without."""
    if not (config.data.tokenizer or config.model.load_model or config.model.model_config):
        kept = find_tokenizer(config.output.proj_dir)
        if kept is None:
            notes.append("tokenizer: none is named, world is assumed")
        tokenizer = kept or load_tokenizer("world")
    else:
        tokenizer = _tokenizer(config, notes)
    samples, skipped = read(config.data.data_file, config, tokenizer, _template(config))
    notes.extend(skipped.lines())
    return samples, tokenizer


def _tokenizer(config: SFTConfig, notes: list[str]) -> Tokenizer:
    """The named one, else the run's own, else the one that belongs to the weights."""
    spec = config.data.tokenizer
    if spec:
        return load_tokenizer(spec)
    kept = find_tokenizer(config.output.proj_dir)
    if kept is not None:
        return kept
    path = _weights(config)
    if path is None:
        raise UserError(
            "nothing says which tokenizer to use: give --tokenizer (world, bytes or a file), or "
            "weights to start from, --load_model"
        )
    return tokenizer_for(path, _vocab_size(path), spec, notes.append)


def _weights(config: SFTConfig) -> Path | None:
    return weights_named(config.model, preset_of(config.model))


def _vocab_size(path: Path) -> int:
    header = read_header(path)
    shapes = (
        {name: tuple(t.shape) for name, t in load_weights(path, verify=False).items()}
        if header is None
        else {name: t.shape for name, t in header.tensors.items()}
    )
    if "emb.weight" not in shapes:
        raise UserError(f"{path} holds no emb.weight: it is no RWKV model")
    return shapes["emb.weight"][0]


def _template(config: SFTConfig) -> Template:
    """The named one, else the run's own, else the one kept with the weights, else G1's."""
    if config.data.template:
        return load_template(config.data.template)
    for place in (config.output.proj_dir, _weights(config)):
        if place and (found := find_template(place)) is not None:
            return found
    return load_template("g1")
