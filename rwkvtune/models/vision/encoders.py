"""Picture encoders of the Hugging Face hub, by transformers, and what they really give: width and
number of tokens come from a dry run, never from a table."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.kernels.calls import without_autocast

KINDS = {
    "siglip": ("siglip", "siglip_vision_model"),
    "clip": ("clip", "clip_vision_model"),
    "dinov2": ("dinov2",),
}
"""encoder_type -> the model types that its folder may have. SigLIP 2 at a fixed size is of type
siglip too."""

OTHER_NAMES = {"siglip2": "siglip", "auto_siglip2": "siglip"}
"""What other programs call them."""

NOT_SUPPORTED = {
    "whisper": "encodes speech; only pictures are trained here",
    "speech": "encodes speech; only pictures are trained here",
    "visual": "has no working encoder in the published program either",
    "state": "has no working encoder in the published program either",
    "siglip2": "is the NaFlex form, whose number of tokens differs from picture to picture; take "
    "one of a fixed size, such as google/siglip2-so400m-patch14-384",
}

PICTURES_AT_ONCE = 32
"""Pictures that go through the encoder together: its memory stays the same for any batch."""


class Encoder(nn.Module):
    """pixels uint8 [N, 3, H, W] -> features [N, n, E] in the encoder's own type.

    Always in eval mode. Without gradients unless its parameters ask for them.
    """

    def __init__(
        self, model: nn.Module, table: Tensor, shape: tuple[int, int], fingerprint: str = ""
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.fingerprint = fingerprint
        """Tells whether features come from the same weights and preparation of pictures."""
        self.shape = shape
        """(height, width) of its pictures."""
        self.register_buffer("table", table.clone(), persistent=False)
        self.num_tokens, self.width = self._dry_run()

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        is_trained = parameter.requires_grad
        if is_trained:
            return self._features(pixels)
        with torch.no_grad(), without_autocast(parameter.device.type):
            parts = pixels.split(PICTURES_AT_ONCE) if len(pixels) else [pixels]
            return torch.cat([self._features(part) for part in parts])

    def _features(self, pixels: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        if not len(pixels):
            return parameter.new_zeros(0, self.num_tokens, self.width)
        channel = torch.arange(3, device=pixels.device)[:, None, None]
        values = self.table[channel, pixels.long()].to(parameter.dtype)  # type: ignore[index]
        found: Tensor = self.model(pixel_values=values).last_hidden_state
        return found

    @torch.no_grad()
    def _dry_run(self) -> tuple[int, int]:
        height, width = self.shape
        try:
            blank = torch.zeros(1, 3, height, width, dtype=next(self.model.parameters()).dtype)
            found = self.model(pixel_values=blank)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"the encoder does not take pictures of {height} x {width}, to which its "
                f"preprocessor_config.json brings them: {str(error).splitlines()[0]}"
            ) from error
        _, tokens, size = found.last_hidden_state.shape
        return tokens, size


def read_processor(path: str) -> dict[str, Any]:
    """The preprocessor_config.json of a local folder or a hub id."""
    _check_place(path)
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        with quiet_transformers():
            found, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except (OSError, ValueError) as error:
        raise UserError(_not_found(path, "preprocessor_config.json", error)) from error
    return dict(found)


def load_encoder(
    path: str,
    kind: str,
    *,
    processor: Mapping[str, Any],
    table: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Encoder:
    """The picture tower of a checkpoint in a local folder or on the hub; both towers may be in it.

    kind: siglip, clip, dinov2 or one of OTHER_NAMES; "" = as its config.json says.
    processor: its preprocessor_config.json.
    table: fp32 [3, 256], what it gets for each pixel value.  shape: (height, width) of its
    pictures; both as data.images.Preprocessing has them.
    UserError when it is of another kind, is incomplete, or cannot be reached.
    """
    config = _vision_config(path, kind)
    from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel

    classes: dict[str, Any] = {
        "siglip": SiglipVisionModel,
        "clip": CLIPVisionModel,
        "dinov2": Dinov2Model,
    }
    family = next(k for k, types in KINDS.items() if config.model_type in types)
    if family == "siglip":
        config.vision_use_head = False  # pools the tokens, which nobody reads
    try:
        with quiet_transformers():
            model, info = classes[family].from_pretrained(
                path, config=config, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_not_found(path, "its weights", error)) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{path} lacks {len(missing)} tensors of a {family} picture tower, such as "
            f"{missing[0]}: is the checkpoint complete?"
        )
    fingerprint = _fingerprint(model, processor)
    return Encoder(model.requires_grad_(False).to(dtype), table, shape, fingerprint)


def _check_place(path: str) -> None:
    """UserError at once for a missing folder that is no name on the hub, which would be asked for
    it again and again."""
    folder = Path(path)
    parts = folder.parts
    looks_local = (
        len(parts) > 2 or path[:1] in "./~" or folder.parent != Path() and folder.parent.is_dir()
    )
    if not folder.is_dir() and looks_local:
        raise MissingFileError(
            f"encoder {path}: there is no such folder, and a name on the hub is OWNER/NAME"
        )


def _vision_config(path: str, kind: str) -> Any:
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(_not_found(path, "config.json", error)) from error
    found = config.model_type
    if found.startswith("siglip2"):
        raise UserError(f"{path}: its type {found} {NOT_SUPPORTED['siglip2']}")
    wanted = OTHER_NAMES.get(kind, kind)
    if wanted not in ("", *KINDS):
        reason = NOT_SUPPORTED.get(wanted, f"is unknown; there are {', '.join(KINDS)}")
        raise UserError(f"encoder_type {kind} {reason}")
    fitting = KINDS.get(wanted, sum(KINDS.values(), ()))
    if found not in fitting:
        names = [k for k, types in KINDS.items() if found in types]
        hint = f"give --encoder_type {names[0]}" if names else f"there are {', '.join(KINDS)}"
        raise UserError(f"{path} is a {found} checkpoint, not {wanted or 'a known one'}: {hint}")
    return getattr(config, "vision_config", config)


def _fingerprint(model: Any, processor: Mapping[str, Any]) -> str:
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps([config, processor], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def take_weights(encoder: Encoder, weights: Mapping[str, Tensor], source: str) -> None:
    """Put in weights that were trained together with an adapter; the fingerprint tells them.

    weights: by this model's names or those of another version of transformers. What pools the
    tokens is left out, as in `load_encoder`. UserError, with `source`, when others do not fit.
    """
    needed = {name: tuple(t.shape) for name, t in encoder.model.state_dict().items()}
    given: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        bare = name.removeprefix("vision_model.")
        if not (bare.startswith("head.") or bare.endswith("position_ids")):
            given[bare if bare in needed else f"vision_model.{bare}"] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if shapes != needed:
        wrong = sorted(n for n in shapes.keys() | needed if shapes.get(n) != needed.get(n))[0]
        raise UserError(
            f"the encoder's weights in {source} are not for this encoder: {wrong} is "
            f"{shapes.get(wrong, 'missing')} there and {needed.get(wrong, 'unknown')} here"
        )
    encoder.model.load_state_dict(given)
    digest = hashlib.sha256(encoder.fingerprint.encode())
    for _, tensor in sorted(given.items()):
        plain = tensor.detach().cpu().float().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)
    encoder.fingerprint = digest.hexdigest()[:32]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its remarks about tensors of a tower that is not loaded."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()


def _not_found(path: str, what: str, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:300]
    if Path(path).is_dir():
        return f"encoder {path}: {what} cannot be read ({reason})"
    return (
        f"encoder {path}: {what} cannot be read; there is no such folder, and as a name on the "
        f"Hugging Face hub it gave: {reason}"
    )
