"""What stands around the time mix and channel mix of every version: embedding, blocks, head.

    x = ln0(emb[ids])
    in each block:  x = x + TimeMix(ln1(x));  x = x + ChannelMix(ln2(x))
    logits = head(ln_out(x))

A version's own file holds its two mixes and their initial values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkvtune.errors import UserError
from rwkvtune.models.dimensions import Dimensions
from rwkvtune.models.layers import Head, LayerNorm, LayerState, Linear, State, compute_dtype


class Block(nn.Module):
    """x + att(ln1(x)), and then the same with ffn(ln2(x)); the first block also owns ln0."""

    def __init__(self, n_embd: int, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.ln1 = LayerNorm(n_embd)
        self.ln2 = LayerNorm(n_embd)
        if layer == 0:
            self.ln0 = LayerNorm(n_embd)
        self.att = att
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: LayerState | None,
        reset: Tensor | None,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """x [B,T,C], the residual stream -> the same behind this block, the first block's value
        (x070 hands it on), the state.

        dtype: of the matrix products.
        """
        z = self.ln1(x, dtype)
        att, v_first, wkv = self.att(z, v_first, state, reset, backend)
        x = x + att
        z2 = self.ln2(x, dtype)
        x = x + self.ffn(z2, None if state is None else state.ffn_shift, reset, backend)
        # Copies: views would keep all of z and z2 alive as long as the state.
        return x, v_first, LayerState(z[:, -1].clone(), wkv, z2[:, -1].clone())


class LanguageModel(nn.Module):
    """logits, state = model(input_ids, state)

    A new one holds no values yet: call init_weights or load_state_dict.
    """

    unused: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are stored for upstream's sake and read by nothing."""

    def __init__(self, config: Dimensions, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.config = config
        self.grad_cp = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.backend = "auto"
        """Which wkv kernel runs; see rwkvtune.kernels.dispatch."""
        V, C = config.vocab_size, config.n_embd
        self.emb = nn.Embedding(V, C, _weight=torch.empty(V, C))  # no time for torch's own values
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = LayerNorm(C)
        self.head = Linear(C, V)
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

        input_ids: int [B, T], or inputs_embeds: [B, T, C] in its place.
        state: from an earlier call; None = zeros, or the tuned states where adapters/state.py has
        put some in.
        reset: bool [B, T], True where a document starts: WKV state and token shifts are zero before
        that token.
        head: takes (hidden [B, T, C], head weight [V, C]) in place of the projection, for losses
        that never build all logits.
        Returns logits [B, T, V] in the compute type (or what `head` returns) and the state after
        the last token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give the model either input_ids or inputs_embeds")
        if input_ids is not None and (input_ids.ndim != 2 or not input_ids.shape[1]):
            raise UserError(
                f"input_ids have the shape {list(input_ids.shape)}: expected [B, T] with at least "
                "one token; one row of ids is ids[None]"
            )
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
        if state is None and hasattr(first.att, "time_state"):
            if reset is not None:
                raise UserError(
                    "a tuned initial state belongs to the start of a row, and documents that start "
                    "inside one would not get it: give each document a row of its own"
                )
            state = self.tuned_state(x)
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

    def compile_blocks(self) -> None:
        """Let torch.compile fuse what lies between the recurrences, block by block, when they next
        run."""
        for block in self.blocks:
            att: Any = block.att
            # A hand-written kernel with its own backward: nothing for the compiler to look into.
            att.recurrence = torch.compiler.disable(att.recurrence)
            block.compile()

    def tuned_state(self, x: Tensor) -> State:
        """The state that each row of x [B, T, C] begins with, from the blocks' att.time_state."""
        nothing = x.new_zeros(len(x), x.shape[2])
        starts = [self.get_parameter(f"blocks.{i}.att.time_state") for i in range(len(self.blocks))]
        return [LayerState(nothing, s.expand(len(x), *s.shape), nothing) for s in starts]

    @torch.no_grad()
    def decay_of_layers(self) -> list[Tensor]:
        """Per block the share of its state that each channel keeps from one token to the next by
        what is learned alone, that is without what the token adds to it: fp32, in (0, 1)."""
        learned = [p for name, p in self.named_parameters() if name.endswith("att.time_decay")]
        return [torch.exp(-torch.exp(decay.float())) for decay in learned]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its published initial value, random ones from `generator`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_value(name, parameter, generator))

    def initial_value(self, name: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """The initial tensor of one parameter, fp32, on the default device.

        Source: RWKV-LM, generate_init_weight.
        """
        value = torch.empty(like.shape, dtype=torch.float32)
        c = self.config
        if name == "emb.weight":
            return value.uniform_(-1e-4, 1e-4, generator=generator)
        if name == "head.weight":
            gain = 0.5 * math.sqrt(max(c.vocab_size / c.n_embd, 1.0))
            return nn.init.orthogonal_(value, gain, generator)
        part = name.split(".", 2)[-1]  # "att.w0" of "blocks.3.att.w0"
        if part.endswith("bias"):
            return value.zero_()
        if name.startswith("ln_out") or part.startswith("ln"):
            return value.fill_(1.0)
        layer = int(name.split(".")[1])
        if part == "att.ln_x.weight":
            return value.fill_(((1 + layer) / c.n_layer) ** 0.7)
        if part in ORTHOGONAL_GAINS:
            return nn.init.orthogonal_(value, ORTHOGONAL_GAINS[part], generator)
        if part in ZERO_MATRICES:
            return value.zero_()
        return self.own_initial_value(part, layer, value, generator)

    def own_initial_value(
        self, part: str, layer: int, value: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The initial tensor of what only this version has: fill `value`, or return another of its
        shape.

        part: the name within block `layer`, such as "att.w0".
        """
        raise NotImplementedError


ORTHOGONAL_GAINS = {
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "att.gate.weight": 0.1,
    "ffn.key.weight": 1.0,
}
ZERO_MATRICES = ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")


class Ramps:
    """What the initial vectors of a layer are made of, over the channels i of C."""

    def __init__(self, config: Dimensions, layer: int) -> None:
        C, L = config.n_embd, config.n_layer
        self.r0 = layer / (L - 1) if L > 1 else 0.0
        """From 0 at the first layer to 1 at the last."""
        self.r1 = 1.0 - layer / L
        """From 1 at the first layer towards 0."""
        # Powers of d are taken in fp32 and those of n in fp64, as upstream does, to agree to the
        # last bit.
        self.d = torch.arange(C, dtype=torch.float32) / C
        self.i = torch.arange(C, dtype=torch.float64)
        self.n = self.i / max(C - 1, 1)

    @property
    def decay(self) -> Tensor:
        """Raw decays of x052 and x060."""
        return (-6 + 5 * self.n ** (0.7 + 1.3 * self.r0)).float()

    @property
    def bonus(self) -> Tensor:
        """What a token's own key and value count for in x052 and x060."""
        zigzag = 0.1 * ((self.i + 1) % 3 - 1)
        return (self.r0 * (1 - self.n) + zigzag).float()


def _accept_upstream_spellings(
    model: LanguageModel, weights: dict[str, Tensor], prefix: str, *unused: object
) -> None:
    """Let load_state_dict take any upstream file, editing torch's own copy of its dictionary.

    Vectors come as [C] or [1, 1, C]; keys of sharded DeepSpeed runs carry `_forward_module.`;
    parameters that nothing reads may be missing or of another width.
    """
    for name in [n for n in weights if n.startswith("_forward_module.")]:
        weights[name.removeprefix("_forward_module.")] = weights.pop(name)
    # Of an adapter's few tensors none is missing.
    is_whole = f"{prefix}emb.weight" in weights
    for name, parameter in model.named_parameters():
        key = prefix + name
        if name in model.unused and (
            (is_whole and key not in weights)
            or (key in weights and weights[key].numel() != parameter.numel())
        ):
            weights[key] = torch.zeros(parameter.shape)
        given = weights.get(key)
        if given is None or given.shape == parameter.shape:
            continue
        if [n for n in given.shape if n > 1] == [n for n in parameter.shape if n > 1]:
            weights[key] = given.reshape(parameter.shape)
