"""Copies of weights in the type of a product: the same bits as a cast, never older than the
weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rwkvtune.kernels.working_weights import in_type, keep_copies, write_copies


def test_a_kept_copy_gives_the_bits_and_the_gradient_of_a_cast() -> None:
    torch.manual_seed(0)
    kept = nn.Parameter(torch.randn(40, 30))
    cast = nn.Parameter(kept.detach().clone())
    keep_copies([kept])
    optimizers = [torch.optim.AdamW([p], lr=0.1, fused=True) for p in (kept, cast)]
    for _ in range(3):
        for _ in range(2):  # micro-batches, the second of which finds the copy
            x = torch.randn(7, 30).bfloat16()
            results = [x @ in_type(p, torch.bfloat16).T for p in (kept, cast)]
            assert torch.equal(*results)
            for y in results:
                y.float().square().sum().backward()
        assert kept.grad is not None and cast.grad is not None
        assert kept.grad.dtype == torch.float32 and torch.equal(kept.grad, cast.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        write_copies([kept, cast])
        assert torch.equal(kept, cast)


def test_the_copy_is_written_once_until_the_weight_changes() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    keep_copies([weight])
    with torch.inference_mode():
        first = in_type(weight, torch.bfloat16)
    again = in_type(weight, torch.bfloat16)  # may be kept for a backward pass all the same
    again.sum().backward()
    assert first.data_ptr() == again.data_ptr()
    with torch.no_grad():
        weight.copy_(torch.full((4, 4), 3.0))
    assert in_type(weight, torch.bfloat16).unique().tolist() == [3.0]
    assert in_type(weight, torch.float16).dtype == torch.float16
    assert in_type(weight, torch.float32).data_ptr() == weight.data_ptr()


def test_a_backward_pass_whose_weight_has_moved_since_is_an_error_not_a_wrong_gradient() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    keep_copies([weight])
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    y = (x @ in_type(weight, torch.bfloat16)).sum()
    with torch.no_grad():
        weight.mul_(2)
    in_type(weight, torch.bfloat16)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
