"""RWKV-7 "Goose" (x070): the whole model, from its formulas to its initial values.

Attribute names are the keys of upstream checkpoints, so `load_state_dict` needs no map.
Shapes: B batch, T tokens, C width, H heads, N head size, V vocabulary.
Source: arXiv:2503.14456; initial values: RWKV-LM, RWKV-v7/train_temp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkvtune.errors import UserError
from rwkvtune.kernels.fused.time_mix import norm_bonus_gate, prepare_keys, squared_relu
from rwkvtune.kernels.fused.token_shift import token_shift_mix
from rwkvtune.kernels.wkv7 import wkv7
from rwkvtune.kernels.wkv7.reference import LOG_DECAY_SCALE
from rwkvtune.models.layers import Head, LayerNorm, LayerState, Linear, State, compute_dtype
from rwkvtune.models.rwkv7.config import UNUSED, RWKV7Config

GROUP_NORM_EPS = 64e-5
"""Upstream divides by 8 before an eps of 1e-5, which is this eps; it does not depend on the head
size."""


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class TimeMix(nn.Module):
    """What a block takes from earlier tokens: the recurrence, and all that prepares its inputs."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads, self.head_size = layer, config.num_heads, config.head_size
        C = config.n_embd
        # The first block makes the value that the others mix in: its own v0, v1, v2 are stored for
        # upstream's sake and read by nothing.
        used = layer > 0
        # Declared in upstream's order, which is the order of the keys in a checkpoint.
        self.x_r = _empty(1, 1, C)
        self.x_w = _empty(1, 1, C)
        self.x_k = _empty(1, 1, C)
        self.x_v = _empty(1, 1, C)
        self.x_a = _empty(1, 1, C)
        self.x_g = _empty(1, 1, C)
        self.w1 = _empty(C, config.decay_rank)
        self.w2 = _empty(config.decay_rank, C)
        self.w0 = _empty(1, 1, C)
        self.a1 = _empty(C, config.a_rank)
        self.a2 = _empty(config.a_rank, C)
        self.a0 = _empty(1, 1, C)
        self.v1 = _empty(C, config.v_rank).requires_grad_(used)
        self.v2 = _empty(config.v_rank, C).requires_grad_(used)
        self.v0 = _empty(1, 1, C).requires_grad_(used)
        self.g1 = _empty(C, config.g_rank)
        self.g2 = _empty(config.g_rank, C)
        self.k_k = _empty(1, 1, C)
        self.k_a = _empty(1, 1, C)
        self.r_k = _empty(self.num_heads, self.head_size)
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
        xr, xw, xk, xv, xa, xg = token_shift_mix(x, mix, before, reset)

        r = self.receptance(xr)
        k = self.key(xk)
        v = self.value(xv)
        # Raw: the kernel bounds the decay, and prepare_keys the in-context learning rate.
        w = F.linear(
            torch.tanh(xw @ self.w1.to(dtype)), self.w2.T.to(dtype), self.w0.to(dtype).view(C)
        )
        a_logit = F.linear(xa @ self.a1.to(dtype), self.a2.T.to(dtype), self.a0.to(dtype).view(C))
        g = torch.sigmoid(xg @ self.g1.to(dtype)) @ self.g2.to(dtype)
        if v_first is None:
            v_first = v
        else:
            gate = F.linear(xv @ self.v1.to(dtype), self.v2.T.to(dtype), self.v0.to(dtype).view(C))
            v = torch.lerp(v, v_first, torch.sigmoid(gate))
        k, removal, insertion = prepare_keys(k, a_logit, self.k_k.view(C), self.k_a.view(C), N)

        r, w, k, v, removal, insertion = (
            z.view(B, T, H, N) for z in (r, w, k, v, removal, insertion)
        )
        before_state = None if state is None else state.wkv
        y, wkv_state = wkv7(
            r, w, k, v, removal, insertion, before_state, reset=reset, backend=backend
        )
        y = norm_bonus_gate(
            y, r, k, v, g, self.r_k, self.ln_x.weight, self.ln_x.bias, GROUP_NORM_EPS
        )
        return self.output(y), v_first, wkv_state


class ChannelMix(nn.Module):
    """A block's feed-forward part: two matrices with a squared ReLU between them."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, x: Tensor, before: Tensor | None, reset: Tensor | None) -> Tensor:
        """x [B,T,C] (after ln2), the token before it [B,C] -> output [B,T,C]."""
        (xk,) = token_shift_mix(x, self.x_k.view(1, -1), before, reset)
        mixed: Tensor = self.value(squared_relu(self.key(xk)))
        return mixed


class Block(nn.Module):
    """x + TimeMix(ln1(x)), and then the same with ChannelMix; the first block also owns ln0."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.n_embd)
        self.ln2 = LayerNorm(config.n_embd)
        if layer == 0:
            self.ln0 = LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: LayerState | None,
        reset: Tensor | None,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor, LayerState]:
        """x [B,T,C], the residual stream -> the same behind this block, the first block's value,
        the state.

        dtype: of the matrix products.
        """
        z = self.ln1(x, dtype)
        att, v_first, wkv = self.att(z, v_first, state, reset, backend)
        x = x + att
        z2 = self.ln2(x, dtype)
        x = x + self.ffn(z2, None if state is None else state.ffn_shift, reset)
        # Copies: views would keep all of z and z2 alive as long as the state.
        return x, v_first, LayerState(z[:, -1].clone(), wkv, z2[:, -1].clone())


class RWKV7(nn.Module):
    """logits, state = model(input_ids, state)

    A new one holds no values yet: call init_weights or load_state_dict.
    """

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.config = config
        self.grad_cp = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.backend = "auto"
        """Which wkv7 kernel runs; see rwkvtune.kernels.dispatch."""
        V, C = config.vocab_size, config.n_embd
        self.emb = nn.Embedding(V, C, _weight=torch.empty(V, C))  # no time for torch's own values
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_out = LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        self.register_load_state_dict_pre_hook(_accept_upstream_spellings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        state: State | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        reset: Tensor | None = None,
        head: Head | None = None,
    ) -> tuple[Tensor, State]:
        """Run T tokens after `state`.

        input_ids: int [B, T], or inputs_embeds: [B, T, C] in its place.  state: from an earlier
        call, or None.
        reset: bool [B, T], True where a document starts: WKV state and token shifts are zero before
        that token.
        head: takes (hidden [B, T, C], head weight [V, C]) in place of the projection, for losses
        that never build all logits.
        Returns logits [B, T, V] in the compute type (or what `head` returns) and the state after
        the last token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give the model either input_ids or inputs_embeds")
        dtype = compute_dtype(self.head.weight)
        # The residual stream keeps the weights' type: only what enters the matrix products is
        # rounded.
        x = (
            self.emb(input_ids)
            if inputs_embeds is None
            else inputs_embeds.to(self.emb.weight.dtype)
        )
        first: Any = self.blocks[0]
        x = first.ln0(x)
        v_first: Tensor | None = None
        new_state: State = []
        recompute = self.grad_cp and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            args = (x, v_first, None if state is None else state[i], reset, dtype, self.backend)
            if recompute:
                x, v_first, layer_state = checkpoint(block, *args, use_reentrant=False)
            else:
                x, v_first, layer_state = block(*args)
            new_state.append(layer_state)
        x = self.ln_out(x, dtype)
        out = self.head(x) if head is None else head(x, self.head.weight)
        return out, new_state

    @torch.no_grad()
    def decay_of_layers(self) -> list[Tensor]:
        """Per block the share of its state that a channel keeps from one token to the next by the
        bias w0 alone, that is without what the token adds to it: fp32 [1, 1, C], in (0.545, 1)."""
        biases = [p for name, p in self.named_parameters() if name.endswith("att.w0")]
        return [torch.exp(LOG_DECAY_SCALE * torch.sigmoid(w0.float())) for w0 in biases]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its published initial value, random ones from `generator`."""
        c = self.config
        for name, parameter in self.named_parameters():
            parameter.copy_(_initial_value(name, parameter, c, generator))


def _initial_value(
    name: str, like: Tensor, c: RWKV7Config, generator: torch.Generator | None
) -> Tensor:
    """The initial tensor of one parameter, fp32, on the default device.  Source: RWKV-LM
    train_temp, generate_init_weight.

    i indexes channels; d = i/C and n = i/(C-1); r0 runs from 0 at the first layer to 1 at the last,
    r1 from 1 towards 0. Powers of d are taken in fp32 and the others in fp64, as upstream does, to
    agree to the last bit.
    """
    value = torch.empty(like.shape, dtype=torch.float32)
    C, N, L = c.n_embd, c.head_size, c.n_layer
    if name == "emb.weight":
        return value.uniform_(-1e-4, 1e-4, generator=generator)
    if name == "head.weight":
        gain = 0.5 * math.sqrt(c.vocab_size / C) if c.vocab_size > C else 0.5
        return nn.init.orthogonal_(value, gain, generator)
    part = name.split(".", 2)[-1]  # "att.w0" of "blocks.3.att.w0"
    if part.endswith("bias"):
        return value.zero_()
    if name.startswith("ln_out") or part.startswith("ln"):
        return value.fill_(1.0)

    layer = int(name.split(".")[1])
    r0 = layer / (L - 1) if L > 1 else 0.0
    r1 = 1.0 - layer / L
    d = torch.arange(C, dtype=torch.float32) / C
    n = torch.arange(C, dtype=torch.float64) / max(C - 1, 1)
    zigzag = (
        (torch.arange(C, dtype=torch.float64) % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
    ).float()
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
        "att.k_a": torch.full((C,), 1.02),
        "att.r_k": torch.full((C,), -0.04),
        "att.ln_x.weight": torch.full((C,), ((1 + layer) / L) ** 0.7),
        "ffn.x_k": 1.0 - d.pow(r1**4),
    }
    if part in vectors:
        return vectors[part].view(like.shape)
    if part in ("att.w1", "att.a1", "att.v1", "att.g1", "att.output.weight", "ffn.value.weight"):
        return value.zero_()
    if part in ("att.w2", "att.a2", "att.v2", "att.g2"):
        rows, columns = value.shape
        return nn.init.orthogonal_(value, 0.1 * math.sqrt(max(rows / columns, 1.0)), generator)
    gains = {
        "att.receptance.weight": 1.0,
        "att.key.weight": 0.1,
        "att.value.weight": 1.0,
        "ffn.key.weight": 1.0,
    }
    return nn.init.orthogonal_(value, gains[part], generator)


def _accept_upstream_spellings(
    model: nn.Module, weights: dict[str, Tensor], prefix: str, *unused: object
) -> None:
    """Let load_state_dict take any upstream x070 file, editing torch's own copy of its dictionary.

    Vectors come as [C] or [1, 1, C]; keys of sharded DeepSpeed runs carry `_forward_module.`; block
    0's unused v0, v1, v2 may be missing or of another width.
    """
    for name in [n for n in weights if n.startswith("_forward_module.")]:
        weights[name.removeprefix("_forward_module.")] = weights.pop(name)
    for name, parameter in model.named_parameters():
        key = prefix + name
        if name in UNUSED and (key not in weights or weights[key].numel() != parameter.numel()):
            weights[key] = torch.zeros(parameter.shape)
        given = weights.get(key)
        if given is None or given.shape == parameter.shape:
            continue
        if [n for n in given.shape if n > 1] == [n for n in parameter.shape if n > 1]:
            weights[key] = given.reshape(parameter.shape)
