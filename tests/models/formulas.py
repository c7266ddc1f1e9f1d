"""The formulas of every version once more, in fp64, one token of one sequence at a time. Written
from the papers' equations, with nothing of the package in it; autograd gives its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Get = Callable[[str], Tensor]
"""A parameter of a block by the rest of its name, without axes of one element."""


class LayerBefore(NamedTuple):
    att: Tensor
    """The time mix's last token."""
    S: Tensor
    """[head, value, key]"""
    ffn: Tensor
    """The channel mix's last token."""


PlainState = list[LayerBefore]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5) * weight + bias


def head_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 64e-5) * weight + bias


def by_head(x: Tensor, heads: int) -> list[Tensor]:
    return list(x.view(heads, -1))


def gated_heads(
    p: Get, S: Tensor, r: Tensor, k: Tensor, v: Tensor, decay: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """x052 and x060 from the projections on: output [C] and the new S."""
    H = len(S)
    split = (by_head(x, H) for x in (r, k, v, decay, p("att.ln_x.weight"), p("att.ln_x.bias")))
    u = p("att.time_faaaa").view(H, -1)
    outputs, states = [], []
    for h, (r_h, k_h, v_h, decay_h, weight, bias) in enumerate(zip(*split, strict=True)):
        vk = torch.outer(v_h, k_h)
        outputs.append(head_norm((S[h] + vk * u[h]) @ r_h, weight, bias))
        states.append(S[h] * decay_h + vk)
    gate = g * torch.sigmoid(g)
    return p("att.output.weight") @ (torch.cat(outputs) * gate), torch.stack(states)


def gated_channel_mix(p: Get, xk: Tensor, xr: Tensor) -> Tensor:
    mixed = p("ffn.value.weight") @ torch.relu(p("ffn.key.weight") @ xk) ** 2
    return torch.sigmoid(p("ffn.receptance.weight") @ xr) * mixed


def x052_time_mix(
    p: Get, z: Tensor, before: LayerBefore, v_first: Tensor | None
) -> tuple[Tensor, Tensor, None]:
    def mixed(name: str) -> Tensor:
        share = p(f"att.time_mix_{name}")
        return z * share + before.att * (1 - share)

    r = p("att.receptance.weight") @ mixed("r")
    k = p("att.key.weight") @ mixed("k")
    v = p("att.value.weight") @ mixed("v")
    g = p("att.gate.weight") @ mixed("g")
    decay = torch.exp(-torch.exp(p("att.time_decay").reshape(-1)))
    return *gated_heads(p, before.S, r, k, v, decay, g), None


def x052_channel_mix(p: Get, z: Tensor, before: Tensor) -> Tensor:
    k, r = p("ffn.time_mix_k"), p("ffn.time_mix_r")
    return gated_channel_mix(p, z * k + before * (1 - k), z * r + before * (1 - r))


def x060_time_mix(
    p: Get, z: Tensor, before: LayerBefore, v_first: Tensor | None
) -> tuple[Tensor, Tensor, None]:
    d = before.att - z
    low_rank = torch.tanh((z + d * p("att.time_maa_x")) @ p("att.time_maa_w1")).chunk(5)
    x = {
        name: z + d * (p(f"att.time_maa_{name}") + low_rank[i] @ p("att.time_maa_w2")[i])
        for i, name in enumerate("wkvrg")
    }
    r = p("att.receptance.weight") @ x["r"]
    k = p("att.key.weight") @ x["k"]
    v = p("att.value.weight") @ x["v"]
    g = p("att.gate.weight") @ x["g"]
    raw = p("att.time_decay") + torch.tanh(x["w"] @ p("att.time_decay_w1")) @ p("att.time_decay_w2")
    return *gated_heads(p, before.S, r, k, v, torch.exp(-torch.exp(raw)), g), None


def x060_channel_mix(p: Get, z: Tensor, before: Tensor) -> Tensor:
    d = before - z
    return gated_channel_mix(p, z + d * p("ffn.time_maa_k"), z + d * p("ffn.time_maa_r"))


def x070_time_mix(
    p: Get, z: Tensor, before: LayerBefore, v_first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    H = len(before.S)
    xr, xw, xk, xv, xa, xg = (z + (before.att - z) * p(f"att.x_{s}") for s in "rwkvag")
    r = p("att.receptance.weight") @ xr
    k = p("att.key.weight") @ xk
    v = p("att.value.weight") @ xv
    decay = torch.exp(
        -math.exp(-0.5) * torch.sigmoid(p("att.w0") + torch.tanh(xw @ p("att.w1")) @ p("att.w2"))
    )
    if v_first is None:
        v_first = v
    else:
        gate = torch.sigmoid(p("att.v0") + (xv @ p("att.v1")) @ p("att.v2"))
        v = v + (v_first - v) * gate
    a = torch.sigmoid(p("att.a0") + (xa @ p("att.a1")) @ p("att.a2"))
    g = torch.sigmoid(xg @ p("att.g1")) @ p("att.g2")
    kk = k * p("att.k_k")
    k = k * (1 + (a - 1) * p("att.k_a"))
    r_k = p("att.r_k").view(H, -1)
    split = (
        by_head(x, H) for x in (r, k, v, decay, a, kk, p("att.ln_x.weight"), p("att.ln_x.bias"))
    )
    outputs, states = [], []
    for h, (r_h, k_h, v_h, decay_h, a_h, kk_h, weight, bias) in enumerate(zip(*split, strict=True)):
        unit = kk_h / kk_h.norm().clamp_min(1e-12)
        S = (
            before.S[h] * decay_h
            - torch.outer(before.S[h] @ unit, unit * a_h)
            + torch.outer(v_h, k_h)
        )
        outputs.append(head_norm(S @ r_h, weight, bias) + v_h * (r_h * k_h * r_k[h]).sum())
        states.append(S)
    return p("att.output.weight") @ (torch.cat(outputs) * g), torch.stack(states), v_first


def x070_channel_mix(p: Get, z: Tensor, before: Tensor) -> Tensor:
    xk = z + (before - z) * p("ffn.x_k")
    return p("ffn.value.weight") @ torch.relu(p("ffn.key.weight") @ xk) ** 2


MIXES = {
    "x052": (x052_time_mix, x052_channel_mix, "att.time_faaaa"),
    "x060": (x060_time_mix, x060_channel_mix, "att.time_faaaa"),
    "x070": (x070_time_mix, x070_channel_mix, "att.r_k"),
}
"""Time mix, channel mix, and the parameter whose shape is heads x head size."""


def plain_token(
    version: str, weights: dict[str, Tensor], token: int, state: PlainState
) -> tuple[Tensor, PlainState]:
    """Logits [V] after one token, and the new state."""
    time_mix, channel_mix, _ = MIXES[version]
    x, v_first = weights["emb.weight"][token], None
    after: PlainState = []
    for layer, before in enumerate(state):

        def p(name: str, layer: int = layer) -> Tensor:
            return weights[f"blocks.{layer}.{name}"].squeeze()

        if layer == 0:
            x = layer_norm(x, p("ln0.weight"), p("ln0.bias"))
        z = layer_norm(x, p("ln1.weight"), p("ln1.bias"))
        att, S, v_first = time_mix(p, z, before, v_first)
        x = x + att
        z2 = layer_norm(x, p("ln2.weight"), p("ln2.bias"))
        x = x + channel_mix(p, z2, before.ffn)
        after.append(LayerBefore(z, S, z2))
    x = layer_norm(x, weights["ln_out.weight"], weights["ln_out.bias"])
    return weights["head.weight"] @ x, after


def plain_logits(
    version: str, weights: dict[str, Tensor], ids: Tensor
) -> tuple[Tensor, list[PlainState]]:
    """Logits [B, T, V] and each sequence's final state, from zeros."""
    H, N = weights[f"blocks.0.{MIXES[version][2]}"].shape
    zeros = torch.zeros(H * N).double()
    start = LayerBefore(zeros, torch.zeros(H, N, N).double(), zeros)
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    logits, states = [], []
    for sequence in ids.tolist():
        state, rows = [start] * layers, []
        for token in sequence:
            row, state = plain_token(version, weights, token, state)
            rows.append(row)
        logits.append(torch.stack(rows))
        states.append(state)
    return torch.stack(logits), states
