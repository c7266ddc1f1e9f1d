"""Which base an adapter belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvtune.errors import UserError
from rwkvtune.models.frame import LanguageModel


@dataclass(frozen=True)
class Base:
    """A frozen model that is referred to, not copied."""

    path: str
    version: str
    shapes: str
    """sha256 of the names and shapes of its tensors."""
    content: str
    """sha256 of their values in fp32: the same for a file in bf16 and its copy in fp32."""

    def check(self, found: Base, adapter: str) -> None:
        """UserError unless what was found is this base; adapter: what belongs to it."""
        if (found.shapes, found.version) != (self.shapes, self.version):
            reason = "has other tensors"
        elif found.content != self.content:
            reason = "has the same shapes but other values"
        else:
            return
        raise UserError(
            f"{found.path} {reason} than the base that {adapter} was trained on, {self.path} "
            f"({self.version}, content {self.content[:12]}): give that base"
        )


def base_of(model: LanguageModel, path: str) -> Base:
    """The reference to a model that holds the weights of a file, before anything is quantized or
    wrapped.  Reads all values: about a second per GB."""
    tensors = {n: t for n, t in model.state_dict().items() if n not in model.unused}
    return base_from(tensors, model.config.version, path)


def base_from(tensors: Mapping[str, Tensor], version: str, path: str) -> Base:
    """The reference to a model of these tensors."""
    shapes, content = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shapes.update(f"{name} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
        content.update(flat.view(torch.uint8).numpy().data)
    return Base(path, version, shapes.hexdigest(), content.hexdigest())
