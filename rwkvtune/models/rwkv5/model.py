"""RWKV-5.2 "Eagle" (x052): its two mixes, from their formulas to their initial values.

Attribute names are the keys of upstream checkpoints, so `load_state_dict` needs no map.
Shapes: B batch, T tokens, C width, H heads, N head size.
Source: arXiv:2404.05892; initial values: RWKV-LM, RWKV-v5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkvtune.kernels.fused.time_mix import norm_gate, squared_relu
from rwkvtune.kernels.fused.token_shift import token_shift_mix
from rwkvtune.kernels.wkv5 import wkv5
from rwkvtune.models.frame import Block, LanguageModel, Ramps
from rwkvtune.models.layers import LayerState, Linear, empty
from rwkvtune.models.rwkv5.config import RWKV5Config

GROUP_NORM_EPS = 64e-5
"""Upstream divides by 8 before an eps of 1e-5, which is this eps."""


class TimeMix(nn.Module):
    """What a block takes from earlier tokens: the recurrence, and all that prepares its inputs."""

    recurrence = staticmethod(wkv5)

    def __init__(self, config: RWKV5Config) -> None:
        super().__init__()
        C, H, N = config.n_embd, config.num_heads, config.head_size
        # Declared in upstream's order, which is the order of the keys in a checkpoint.
        self.time_mix_k = empty(1, 1, C)
        self.time_mix_v = empty(1, 1, C)
        self.time_mix_r = empty(1, 1, C)
        self.time_mix_g = empty(1, 1, C)
        self.time_decay = empty(H, N)
        self.time_faaaa = empty(H, N)
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.gate = Linear(C, C)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: LayerState | None,
        reset: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, None, Tensor]:
        """x [B,T,C] (after ln1) -> output [B,T,C], nothing for other blocks, final WKV state."""
        B, T, C = x.shape
        H, N = self.time_faaaa.shape
        # A share of the token itself, where token_shift_mix takes that of the one before it.
        own = torch.cat([self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g])
        before = None if state is None else state.att_shift
        xk, xv, xr, xg = token_shift_mix(x, 1 - own.view(4, C), before, reset, backend=backend)
        y, wkv_state = self.recurrence(
            self.receptance(xr).view(B, T, H, N),
            self.key(xk).view(B, T, H, N),
            self.value(xv).view(B, T, H, N),
            self.time_decay,
            self.time_faaaa,
            None if state is None else state.wkv,
            reset=reset,
            backend=backend,
        )
        y = norm_gate(
            y, self.gate(xg), self.ln_x.weight, self.ln_x.bias, GROUP_NORM_EPS, backend=backend
        )
        return self.output(y), None, wkv_state


class ChannelMix(nn.Module):
    """A block's feed-forward part: two matrices with a squared ReLU between them, and a gate."""

    def __init__(self, config: RWKV5Config) -> None:
        super().__init__()
        C, F = config.n_embd, config.dim_ffn
        self.time_mix_k = empty(1, 1, C)
        self.time_mix_r = empty(1, 1, C)
        self.key = Linear(C, F)
        self.receptance = Linear(C, C)
        self.value = Linear(F, C)

    def forward(
        self, x: Tensor, before: Tensor | None, reset: Tensor | None, backend: str
    ) -> Tensor:
        """x [B,T,C] (after ln2), the token before it [B,C] -> output [B,T,C]."""
        own = torch.cat([self.time_mix_k, self.time_mix_r]).view(2, -1)
        xk, xr = token_shift_mix(x, 1 - own, before, reset, backend=backend)
        mixed: Tensor = self.value(squared_relu(self.key(xk), backend=backend))
        return torch.sigmoid(self.receptance(xr)) * mixed


class RWKV5(LanguageModel):
    """logits, state = model(input_ids, state); see `LanguageModel`."""

    def __init__(self, config: RWKV5Config) -> None:
        super().__init__(
            config,
            (
                Block(config.n_embd, i, TimeMix(config), ChannelMix(config))
                for i in range(config.n_layer)
            ),
        )

    def own_initial_value(
        self, part: str, layer: int, value: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        ramps = Ramps(self.config, layer)
        d, r0, r1 = ramps.d, ramps.r0, ramps.r1
        vectors: dict[str, Tensor] = {
            "att.time_mix_k": d.pow(r1),
            "att.time_mix_v": d.pow(r1) + 0.3 * r0,
            "att.time_mix_r": d.pow(0.5 * r1),
            "att.time_mix_g": d.pow(0.5 * r1),
            "att.time_decay": ramps.decay,
            "att.time_faaaa": ramps.bonus,
            "ffn.time_mix_k": d.pow(r1),
            "ffn.time_mix_r": d.pow(r1),
        }
        return vectors[part].view(value.shape)
