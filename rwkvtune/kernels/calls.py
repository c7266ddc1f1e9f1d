"""Calling the kernels without the overhead of what is switched off: generation runs hundreds of
small operations per token, and gradients and autocast are off in all of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class _KeepsNothing:
    """In place of autograd's context, for a forward that no backward follows."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: object) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, or its forward alone where gradients are off."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_KeepsNothing(), *args)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """`torch.autocast(device_type, enabled=False)`, or nothing where autocast is off already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
