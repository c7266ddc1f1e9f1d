"""From an adapter on the disk to answers about pictures.

An adapter's file has a description beside it, adapter_config.json, with everything that is needed
to use it again: its form, the encoder, the base, and how pictures and dialogue are prepared.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvtune.checkpoint import load_weights
from rwkvtune.data.images import Preprocessing
from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer, find_tokenizer, load_tokenizer
from rwkvtune.data.visual import TURN_END, Assembly, Sample, collate
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.inference.generate import evaluating, generate
from rwkvtune.inference.load import prepare_matrices
from rwkvtune.inference.tokenizer import without_text
from rwkvtune.models import build_model, config_from_state_dict, fill_model
from rwkvtune.models.frame import LanguageModel
from rwkvtune.models.vision.config import (
    AdapterConfig,
    adapter_config_from_shapes,
    adapter_names,
    split_names,
)
from rwkvtune.models.vision.encoders import (
    Encoder,
    load_encoder,
    read_processor,
    take_weights,
)
from rwkvtune.models.vision.model import Adapter, VisionLanguageModel

if TYPE_CHECKING:
    from PIL.Image import Image

ABOUT_FILE = "adapter_config.json"
EARLIER_STAGE = "stage-1"
"""Folder inside a run folder to which a second stage moves what the first one wrote."""
WORLD_ROWS = range(65530, 65537)
"""Sizes of vocabulary that the World tokenizer is assumed for."""


@dataclass(frozen=True)
class SavedAdapter:
    """A trained adapter as read from the disk."""

    path: Path
    config: AdapterConfig
    weights: dict[str, Tensor]
    """By the names of models.vision.model.Adapter."""
    encoder_weights: dict[str, Tensor] = field(default_factory=dict)
    """By the encoder's own names; empty where it was not trained."""
    about: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json; empty for a file of another program."""


def find_adapter(folder: Path) -> Path | None:
    """The newest adapter of a run folder, also one of the stage before; None when it has none."""
    found = sorted(folder.glob("adapter-*.safetensors"), key=_age)
    final = folder / "adapter-final.safetensors"
    if final in found:
        return final
    if found:
        return found[-1]
    before = folder / EARLIER_STAGE
    return find_adapter(before) if before.is_dir() else None


def _age(path: Path) -> tuple[float, int]:
    number = re.fullmatch(r"adapter-(\d+)\.safetensors", path.name)
    return path.stat().st_mtime, int(number[1]) if number else -1


def read_adapter(path: Path, *, encoder_width: int | None = None) -> SavedAdapter:
    """The adapter of a file (ours, or any published file that has one) or the newest of a run
    folder.

    UserError when there is none, or when it is incomplete.
    """
    if path.is_dir():
        found = find_adapter(path)
        if found is None:
            raise MissingFileError(
                f"{path} has no adapter-*.safetensors: give a file, or train one"
            )
        path = found
    weights = load_weights(path)
    names = adapter_names(weights)
    if not names:
        raise UserError(
            f"{path} has no adapter in it: expected tensors such as proj.0.weight, "
            "modality.world_encoder.adapter.proj.0.weight or proj.mlp.0.weight"
        )
    tensors = {name: weights[old] for name, old in names.items()}
    about = read_about(path)
    if "adapter" not in about and _has_idle_norm(tensors):
        tensors = {name: t for name, t in tensors.items() if not name.startswith("pre_norm.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "adapter" in about:
        config = AdapterConfig(**about["adapter"])
    else:
        config = adapter_config_from_shapes(shapes, encoder_width=encoder_width)
    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in Adapter(config).state_dict().items()}
    if shapes != expected:
        wrong = sorted(n for n in shapes.keys() | expected if shapes.get(n) != expected.get(n))
        raise UserError(
            f"{path}: the adapter is not whole: {wrong[0]} is {shapes.get(wrong[0], 'missing')}, "
            f"expected {expected.get(wrong[0], 'nothing of this name')}"
        )
    _, _, encoder = split_names(weights)
    trained = {_encoder_name(name): weights[name] for name in encoder}
    return SavedAdapter(path, config, tensors, trained, about)


def _has_idle_norm(tensors: Mapping[str, Tensor]) -> bool:
    """True for the projector of the later WorldRWKV's `auto_siglip2`, which has a norm beside its
    convolution and leaves it out of its forward: no training has moved it from where it began."""
    weight, bias = tensors.get("pre_norm.weight"), tensors.get("pre_norm.bias")
    if "conv.weight" not in tensors or weight is None or bias is None:
        return False
    return bool((weight == 1).all() and (bias == 0).all())


def _encoder_name(name: str) -> str:
    for prefix in ("modality.world_encoder.model.", "encoder.model.", "encoder."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def read_about(path: Path) -> dict[str, Any]:
    """The adapter_config.json beside a file; empty when there is none."""
    file = path.with_name(ABOUT_FILE)
    if not file.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    # A folder of peft has a file of the same name.
    return content if content.get("format") == "rwkvtune vision adapter" else {}


def language_model_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Tensors of the language model in a file, by its own names, and whether it is a multimodal
    file, with an adapter beside them."""
    weights = load_weights(path)
    llm, adapter, _ = split_names(weights)
    return {name: weights[old] for name, old in llm.items()}, bool(adapter)


def load_language_model(path: Path, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """As `load_model`, also from a multimodal file; on the CPU."""
    weights, _ = language_model_weights(path)
    model = build_model(config_from_state_dict(weights), initial_values=False)
    prepare_matrices(model, dtype)
    fill_model(model, weights, str(path))
    return model.eval()


def tokenizer_for(path: Path, vocab_size: int, spec: str = "") -> Tokenizer:
    """The tokenizer named by spec, else the one kept with the weights, else World for its sizes."""
    tokenizer = load_tokenizer(spec) if spec else find_tokenizer(path)
    if tokenizer is None and vocab_size in WORLD_ROWS:
        tokenizer = load_tokenizer("world")
    if tokenizer is None:
        raise UserError(
            f"{path} has no tokenizer beside it, and {vocab_size} ids tell of none: give "
            "--tokenizer bytes, world, a tokenizer.json or a vocabulary file"
        )
    needed = 1 + max(set(range(tokenizer.vocab_size)) - set(tokenizer.unused_ids))
    if needed > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has ids up to {needed - 1}, {path} knows 0 to "
            f"{vocab_size - 1}: give --tokenizer the one that it was trained with"
        )
    return tokenizer


def open_encoder(path: str, kind: str, dtype: torch.dtype) -> tuple[Encoder, Preprocessing]:
    """An encoder, and how its pictures are prepared."""
    processor = read_processor(path)
    preprocessing = Preprocessing.from_processor(processor)
    encoder = load_encoder(
        path,
        kind,
        processor=processor,
        table=torch.from_numpy(preprocessing.table()),
        shape=preprocessing.shape,
        dtype=dtype,
    )
    return encoder, preprocessing


@dataclass(frozen=True)
class VisionSystem:
    """All that answers need."""

    model: VisionLanguageModel
    assembly: Assembly
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()
    """Lines about what may make its answers worse."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.assembly.tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.llm.emb.weight.device

    @cached_property
    def banned_ids(self) -> list[int]:
        """Ids that no answer has: they stand for no text, and are not the end of one."""
        banned = set(without_text(self.tokenizer, self.model.llm.config.vocab_size))
        return sorted(banned - {END_OF_DOCUMENT})

    def features(self, pictures: Sequence[Image]) -> Tensor:
        """What the encoder makes of pictures: [N, n, E]."""
        pixels = np.stack([self.preprocessing.pixels(picture) for picture in pictures])
        with evaluating(self.model):
            found: Tensor = self.model.encoder(torch.from_numpy(pixels).to(self.device))
        return found


def load_vision(
    path: Path,
    *,
    load_model: str = "",
    encoder_path: str = "",
    encoder_type: str = "",
    tokenizer: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VisionSystem:
    """The system of a run folder, of an adapter's file or of a published multimodal file.

    load_model, encoder_path, encoder_type, tokenizer: in place of those that adapter_config.json
    names.
    """
    saved = read_adapter(path)
    about = saved.about
    base = load_model or _base_of(saved)
    where = encoder_path or _from_here(about.get("encoder", {}).get("path", ""), about)
    if not where:
        raise UserError(f"{saved.path} does not say which encoder it is for: give --encoder_path")
    kind = encoder_type or ("" if encoder_path else about["encoder"].get("type", ""))
    encoder, preprocessing = open_encoder(where, kind, dtype)
    if encoder.width != saved.config.encoder_width:
        saved = read_adapter(path, encoder_width=encoder.width)
    check_widths(saved, encoder)
    notes = other_encoder(saved, encoder)
    if saved.encoder_weights:
        take_weights(encoder, saved.encoder_weights, str(saved.path))
    llm = load_language_model(Path(base), dtype=dtype)
    if llm.config.n_embd != saved.config.n_embd:
        raise UserError(
            f"{saved.path} is for models of width {saved.config.n_embd}, {base} has "
            f"{llm.config.n_embd}: give --load_model the one that it was trained with"
        )
    adapter = Adapter(saved.config)
    adapter.load_state_dict(saved.weights)
    template = about.get("template", {})
    assembly = Assembly(
        tokenizer_for(
            Path(base),
            llm.config.vocab_size,
            tokenizer or _from_here(about.get("tokenizer", ""), about),
        ),
        saved.config.num_tokens(encoder.num_tokens),
        form=template.get("form", "prefix"),
        keep_image_tag=template.get("keep_image_tag", False),
    )
    model = VisionLanguageModel(llm, encoder, adapter).requires_grad_(False)
    return VisionSystem(model.to(device).eval(), assembly, preprocessing, notes)


def _base_of(saved: SavedAdapter) -> str:
    """The language model that an adapter was trained with: one of its own run, or the base."""
    own = saved.path.with_name(saved.path.stem.replace("adapter-", "rwkv-") + ".pth")
    if saved.path.suffix == ".pth" or "emb.weight" in split_names(load_weights(saved.path))[0]:
        return str(saved.path)
    if own.exists():
        return str(own)
    about = saved.about
    if about.get("peft", "none") != "none":
        lora = saved.path.with_name(saved.path.stem.replace("adapter-", "lora-"))
        raise UserError(
            f"{saved.path} belongs to a language model with LoRA: put the two together by "
            f"`rwkvtune merge {about['base']['path']} {lora} merged.pth`, and give "
            "--load_model merged.pth"
        )
    if not about:
        raise UserError(
            f"{saved.path} does not say which language model it is for: give --load_model"
        )
    return _from_here(str(about["base"]["path"]), about)


def _from_here(path: str, about: Mapping[str, Any]) -> str:
    """A path of adapter_config.json, which may begin in the folder that the run was started in."""
    there = os.path.join(about.get("folder", ""), path)
    return there if path and not os.path.exists(path) and os.path.exists(there) else path


def check_widths(saved: SavedAdapter, encoder: Encoder) -> None:
    if encoder.width != saved.config.encoder_width:
        raise UserError(
            f"{saved.path} is for an encoder of width {saved.config.encoder_width}, this one has "
            f"{encoder.width}: give --encoder_path the one that it was trained with"
        )


def other_encoder(saved: SavedAdapter, encoder: Encoder) -> tuple[str, ...]:
    """A line where an encoder, as its folder has it, is not the one of the adapter's training."""
    trained_with = saved.about.get("encoder", {}).get("fingerprint", encoder.fingerprint)
    if saved.encoder_weights or trained_with == encoder.fingerprint:
        return ()
    return (
        f"warning: {saved.path} was trained with another encoder than this one, whose weights, "
        "config.json or preprocessor_config.json differ",
    )


class VisionChat:
    """A dialogue about pictures: the state is carried from turn to turn, so each picture is read
    once."""

    def __init__(self, system: VisionSystem) -> None:
        self.system = system
        self.state: Any = None

    def ask(
        self,
        text: str,
        pictures: Sequence[Image] = (),
        *,
        max_tokens: int = 500,
        **sampling: Any,
    ) -> Iterator[int]:
        """Ids of the answer as they come; sampling as in `generate`."""
        system = self.system
        llm, tokenizer = system.model.llm, system.tokenizer
        sample = system.assembly.question(text, pictures=len(pictures))
        features = system.features(pictures) if pictures else None
        last = int(sample.ids[-1])
        state = read_prompt(system, [sample], features, self.state)
        ends = {END_OF_DOCUMENT, *tokenizer.encode(TURN_END)}
        said = []
        for id in generate(
            llm, [last], max_tokens=max_tokens, stop_ids=ends, banned_ids=system.banned_ids,
            state=state, **sampling,
        ):  # fmt: skip
            said.append(id)
            yield id
        whole = torch.tensor([[last, *said, *tokenizer.encode(TURN_END)]], device=system.device)
        with evaluating(llm):
            _, self.state = llm(whole, state, head=_nothing)


def read_prompt(
    system: VisionSystem, samples: Sequence[Sample], features: Tensor | None, state: Any
) -> Any:
    """The state after all of the samples' tokens but the last one; they are of one length."""
    parts = [Sample(s.ids[:-1], s.labels[:-1], s.is_image[:-1], s.pictures) for s in samples]
    batch = collate(parts, len(parts[0].ids)).to(system.device)
    with evaluating(system.model):
        _, state = system.model(
            batch.input_ids,
            state,
            image_positions=batch.image_positions if features is not None else None,
            features=features,
            head=_nothing,
        )
    return state


def _nothing(hidden: Tensor, head_weight: Tensor) -> Tensor:
    return hidden[:, -1]


def log_likelihoods(
    system: VisionSystem, samples: Sequence[Sample], features: Tensor | None
) -> Tensor:
    """Sum of log p over the labelled tokens of each sample, fp32 [B].

    features: [N, n, E] of all samples' pictures in their order.
    """
    longest = max(len(sample.ids) for sample in samples)
    batch = collate(samples, longest + 16).to(system.device)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        counted = batch.targets != -100
        logits = F.linear(hidden[counted], weight.to(hidden.dtype)).float()
        losses = F.cross_entropy(logits, batch.targets[counted], reduction="none")
        rows = counted.nonzero()[:, 0]
        return losses.new_zeros(len(samples)).index_add_(0, rows, -losses)

    with evaluating(system.model):
        found, _ = system.model(
            batch.input_ids,
            image_positions=batch.image_positions if features is not None else None,
            features=features,
            head=head,
        )
    likelihoods: Tensor = found
    return likelihoods


def describe(value: Mapping[str, Any]) -> bytes:
    """adapter_config.json as it is written."""
    return (json.dumps({"format": "rwkvtune vision adapter", **value}, indent=1) + "\n").encode()
