"""RWKV-7 "Goose" (x070): its two mixes, from their formulas to their initial values.

Attribute names are the keys of upstream checkpoints, so `load_state_dict` needs no map.
Shapes: B batch, T tokens, C width, H heads, N head size, V vocabulary.
Source: arXiv:2503.14456; initial values: RWKV-LM, RWKV-v7/train_temp.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvtune.kernels.fused.time_mix import (
    norm_bonus_gate,
    prepare_keys,
    squared_relu,
    value_residual,
)
from rwkvtune.kernels.fused.token_shift import token_shift_mix
from rwkvtune.kernels.wkv7 import wkv7
from rwkvtune.kernels.wkv7.reference import LOG_DECAY_SCALE
from rwkvtune.kernels.working_weights import in_type
from rwkvtune.models.frame import Block, LanguageModel, Ramps
from rwkvtune.models.layers import LayerState, Linear, empty
from rwkvtune.models.rwkv7.config import UNUSED, RWKV7Config

GROUP_NORM_EPS = 64e-5
"""Upstream divides by 8 before an eps of 1e-5, which is this eps; it does not depend on the head
size."""


class TimeMix(nn.Module):
    """What a block takes from earlier tokens: the recurrence, and all that prepares its inputs."""

    recurrence = staticmethod(wkv7)

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads, self.head_size = layer, config.num_heads, config.head_size
        C = config.n_embd
        # The first block makes the value that the others mix in: its own v0, v1, v2 are stored for
        # upstream's sake and read by nothing.
        used = layer > 0
        # Declared in upstream's order, which is the order of the keys in a checkpoint.
        self.x_r = empty(1, 1, C)
        self.x_w = empty(1, 1, C)
        self.x_k = empty(1, 1, C)
        self.x_v = empty(1, 1, C)
        self.x_a = empty(1, 1, C)
        self.x_g = empty(1, 1, C)
        self.w1 = empty(C, config.decay_rank)
        self.w2 = empty(config.decay_rank, C)
        self.w0 = empty(1, 1, C)
        self.a1 = empty(C, config.a_rank)
        self.a2 = empty(config.a_rank, C)
        self.a0 = empty(1, 1, C)
        self.v1 = empty(C, config.v_rank).requires_grad_(used)
        self.v2 = empty(config.v_rank, C).requires_grad_(used)
        self.v0 = empty(1, 1, C).requires_grad_(used)
        self.g1 = empty(C, config.g_rank)
        self.g2 = empty(config.g_rank, C)
        self.k_k = empty(1, 1, C)
        self.k_a = empty(1, 1, C)
        self.r_k = empty(self.num_heads, self.head_size)
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = nn.GroupNorm(self.num_heads, C, eps=GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: LayerState | None,
        reset: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,C] (after ln1) -> output [B,T,C], the first block's value, the final WKV state."""
        B, T, C = x.shape
        H, N, dtype = self.num_heads, self.head_size, x.dtype
        mix = torch.cat([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]).view(6, C)
        before = None if state is None else state.att_shift
        xr, xw, xk, xv, xa, xg = token_shift_mix(x, mix, before, reset, backend=backend)

        r = self.receptance(xr)
        k = self.key(xk)
        v = self.value(xv)
        # Raw: the kernel bounds the decay, and prepare_keys the in-context learning rate.
        w = low_rank(torch.tanh(xw @ in_type(self.w1, dtype)), self.w2, self.w0)
        a_logit = low_rank(xa @ in_type(self.a1, dtype), self.a2, self.a0)
        g = torch.sigmoid(xg @ in_type(self.g1, dtype)) @ in_type(self.g2, dtype)
        if v_first is None:
            v_first = v
        else:
            gate = low_rank(xv @ in_type(self.v1, dtype), self.v2, self.v0)
            v = value_residual(v, v_first, gate, backend=backend)
        k, removal, insertion = prepare_keys(
            k, a_logit, self.k_k.view(C), self.k_a.view(C), N, backend=backend
        )

        r, w, k, v, removal, insertion = (
            z.view(B, T, H, N) for z in (r, w, k, v, removal, insertion)
        )
        before_state = None if state is None else state.wkv
        y, wkv_state = self.recurrence(
            r, w, k, v, removal, insertion, before_state, reset=reset, backend=backend
        )
        y = norm_bonus_gate(
            y, r, k, v, g, self.r_k, self.ln_x.weight, self.ln_x.bias, GROUP_NORM_EPS,
            backend=backend,
        )  # fmt: skip
        return self.output(y), v_first, wkv_state


def low_rank(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B,T,M] times the second of two thin matrices, [M,C], and a bias [1,1,C], in x's type."""
    return F.linear(x, in_type(weight, x.dtype).T, bias.to(x.dtype).view(-1))


class ChannelMix(nn.Module):
    """A block's feed-forward part: two matrices with a squared ReLU between them."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(
        self, x: Tensor, before: Tensor | None, reset: Tensor | None, backend: str
    ) -> Tensor:
        """x [B,T,C] (after ln2), the token before it [B,C] -> output [B,T,C]."""
        (xk,) = token_shift_mix(x, self.x_k.view(1, -1), before, reset, backend=backend)
        mixed: Tensor = self.value(squared_relu(self.key(xk), backend=backend))
        return mixed


class RWKV7(LanguageModel):
    """logits, state = model(input_ids, state); see `LanguageModel`."""

    unused = UNUSED

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(
            config,
            (
                Block(config.n_embd, i, TimeMix(config, i), ChannelMix(config))
                for i in range(config.n_layer)
            ),
        )

    @torch.no_grad()
    def decay_of_layers(self) -> list[Tensor]:
        """As in `LanguageModel`, by the bias w0 alone: in (0.545, 1)."""
        biases = [p for name, p in self.named_parameters() if name.endswith("att.w0")]
        return [torch.exp(LOG_DECAY_SCALE * torch.sigmoid(w0.float())) for w0 in biases]

    def own_initial_value(
        self, part: str, layer: int, value: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        ramps, N = Ramps(self.config, layer), self.config.head_size
        d, n, r0, r1 = ramps.d, ramps.n, ramps.r0, ramps.r1
        zigzag = ((ramps.i % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)).float()
        zz, lin = zigzag * zigzag.abs(), (n - 0.5).float()
        vectors: dict[str, Tensor] = {
            "att.x_r": 1.0 - d.pow(0.2 * r1),
            "att.x_w": 1.0 - d.pow(0.9 * r1),
            "att.x_k": 1.0 - d.pow(0.7 * r1),
            "att.x_v": 1.0 - d.pow(0.7 * r1),
            "att.x_a": 1.0 - d.pow(0.9 * r1),
            "att.x_g": 1.0 - d.pow(0.2 * r1),
            "att.w0": (-6 + 6 * n ** (1 + r0**0.3)).float() + 0.5 + zz * 2.5,
            "att.a0": -0.19 + zz * 0.3 + lin * 0.4,
            "att.v0": 0.73 - lin * 0.4,
            "att.k_k": 0.71 - lin * 0.1,
            "att.k_a": torch.full_like(d, 1.02),
            "att.r_k": torch.full_like(d, -0.04),
            "ffn.x_k": 1.0 - d.pow(r1**4),
        }
        if part in vectors:
            return vectors[part].view(value.shape)
        if part in ("att.w1", "att.a1", "att.v1", "att.g1"):
            return value.zero_()
        assert part in ("att.w2", "att.a2", "att.v2", "att.g2"), part
        rows, columns = value.shape
        return nn.init.orthogonal_(value, 0.1 * math.sqrt(max(rows / columns, 1.0)), generator)
