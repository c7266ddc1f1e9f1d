"""RWKV-6 "Finch" (x060): its two mixes, from their formulas to their initial values.

Attribute names are the keys of upstream checkpoints, so `load_state_dict` needs no map.
Shapes: B batch, T tokens, C width, H heads, N head size, M low-rank width of a mix.
Source: arXiv:2404.05892; initial values: RWKV-LM, RWKV-v5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkvtune.kernels.fused.time_mix import norm_gate, squared_relu
from rwkvtune.kernels.fused.token_shift import blend, shift_difference, token_shift_mix
from rwkvtune.kernels.wkv6 import wkv6
from rwkvtune.kernels.working_weights import in_type
from rwkvtune.models.frame import Block, LanguageModel, Ramps
from rwkvtune.models.layers import LayerState, Linear, empty
from rwkvtune.models.rwkv6.config import RWKV6Config

GROUP_NORM_EPS = 64e-5
"""1e-5 times the square of upstream's head_size_divisor, 8."""


class TimeMix(nn.Module):
    """What a block takes from earlier tokens: the recurrence, and all that prepares its inputs."""

    recurrence = staticmethod(wkv6)

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        C, H, N = config.n_embd, config.num_heads, config.head_size
        # Declared in upstream's order, which is the order of the keys in a checkpoint.
        self.time_maa_x = empty(1, 1, C)
        self.time_maa_w = empty(1, 1, C)
        self.time_maa_k = empty(1, 1, C)
        self.time_maa_v = empty(1, 1, C)
        self.time_maa_r = empty(1, 1, C)
        self.time_maa_g = empty(1, 1, C)
        self.time_maa_w1 = empty(C, config.mix_columns)
        self.time_maa_w2 = empty(5, config.mix_rank, C)
        self.time_decay = empty(1, 1, C)
        self.time_decay_w1 = empty(C, config.decay_rank)
        self.time_decay_w2 = empty(config.decay_rank, C)
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
        (H, N), dtype = self.time_faaaa.shape, x.dtype
        d = shift_difference(x, None if state is None else state.att_shift, reset)
        mixed = torch.addcmul(x, d, self.time_maa_x.to(dtype))
        low_rank = torch.tanh(mixed @ in_type(self.time_maa_w1, dtype))
        low_rank = low_rank.view(B * T, 5, -1).transpose(0, 1)  # [5,BT,M]
        fixed = torch.cat(
            [self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g]
        ).view(5, 1, C)
        mix = torch.baddbmm(fixed.to(dtype), low_rank, in_type(self.time_maa_w2, dtype))
        xw, xk, xv, xr, xg = blend(x, d, mix.view(5, B, T, C))

        # fp32: a decay near 1 is the exponential of a small number, which 8 bits would blur.
        w = self.time_decay + torch.tanh(xw @ in_type(self.time_decay_w1, dtype)) @ (
            in_type(self.time_decay_w2, dtype)
        )
        y, wkv_state = self.recurrence(
            self.receptance(xr).view(B, T, H, N),
            self.key(xk).view(B, T, H, N),
            self.value(xv).view(B, T, H, N),
            w.view(B, T, H, N),
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

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        C, F = config.n_embd, config.dim_ffn
        self.time_maa_k = empty(1, 1, C)
        self.time_maa_r = empty(1, 1, C)
        self.key = Linear(C, F)
        self.receptance = Linear(C, C)
        self.value = Linear(F, C)

    def forward(
        self, x: Tensor, before: Tensor | None, reset: Tensor | None, backend: str
    ) -> Tensor:
        """x [B,T,C] (after ln2), the token before it [B,C] -> output [B,T,C]."""
        mix = torch.cat([self.time_maa_k, self.time_maa_r]).view(2, -1)
        xk, xr = token_shift_mix(x, mix, before, reset, backend=backend)
        mixed: Tensor = self.value(squared_relu(self.key(xk), backend=backend))
        return torch.sigmoid(self.receptance(xr)) * mixed


class RWKV6(LanguageModel):
    """logits, state = model(input_ids, state); see `LanguageModel`."""

    def __init__(self, config: RWKV6Config) -> None:
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
            "att.time_maa_x": 1.0 - d.pow(r1),
            "att.time_maa_w": 1.0 - d.pow(r1),
            "att.time_maa_k": 1.0 - d.pow(r1),
            "att.time_maa_v": 1.0 - (d.pow(r1) + 0.3 * r0),
            "att.time_maa_r": 1.0 - d.pow(0.5 * r1),
            "att.time_maa_g": 1.0 - d.pow(0.5 * r1),
            "att.time_decay": ramps.decay,
            "att.time_faaaa": ramps.bonus,
            "ffn.time_maa_k": 1.0 - d.pow(r1**3),
            "ffn.time_maa_r": 1.0 - d.pow(r1**3),
        }
        if part in vectors:
            return vectors[part].view(value.shape)
        if part in ("att.time_maa_w1", "att.time_decay_w1"):
            return value.zero_()
        assert part in ("att.time_maa_w2", "att.time_decay_w2"), part
        return value.uniform_(-0.01, 0.01, generator=generator)
