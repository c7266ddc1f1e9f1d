"""What an adapter is, in words that a file can hold. No torch: settings are checked at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rwkvtune.errors import UserError

LORA_KINDS = ("lora", "rslora", "dora", "pissa")
KINDS = (*LORA_KINDS, "miss", "state")

TARGETS = r"(.*\.)?blocks\.\d+\.(att|ffn)\.(receptance|key|value|output|gate)"
"""The projections of time mix and channel mix, of every version."""

R, ALPHA = 16, 32.0


@dataclass(frozen=True)
class AdapterSettings:
    kind: str
    """One of KINDS."""
    r: int | None = None
    """Rank; None = R."""
    alpha: float | None = None
    """The update counts alpha / r (rslora: alpha / sqrt(r)); None = ALPHA, pissa and miss: r."""
    targets: str = ""
    """Names of modules with commas between them, each the end of a whole name, or a regular
    expression for whole names; empty = TARGETS."""
    train_modules: str = ""
    """Names of modules with commas between them that are trained in full beside it."""
    peft_config: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of peft's LoraConfig or MissConfig."""
    quant: str = "none"
    """none, or a kind of quant.KINDS for the frozen base."""

    def problems(self) -> list[str]:
        """What contradicts itself, without a look at any model."""
        found = []
        is_lora, has_rank = self.kind in LORA_KINDS, self.kind != "state"
        if self.r is not None and self.r < 1:
            found.append(f"lora_r={self.r} must be at least 1")
        alpha = self.alpha if self.alpha is not None else self.peft_config.get("lora_alpha", 1)
        if not (isinstance(alpha, int | float) and alpha > 0):
            found.append(f"lora_alpha={alpha!r} must be a number above 0")
        if self.alpha is not None and not is_lora:
            found.append(f"lora_alpha={self.alpha:g}: peft={self.kind} has no such scale")
        if not has_rank:
            unused = {
                "lora_r": self.r,
                "lora_targets": self.targets,
                "train_modules": self.train_modules,
                "peft_config": self.peft_config,
            }
            found += [
                f"{name}={value!r}: peft=state trains the initial states only, leave it out"
                for name, value in unused.items()
                if value
            ]
        if self.kind == "pissa" and self.quant != "none":
            found.append(
                f"quant={self.quant}: pissa takes its first components out of the base, which a "
                "packed base cannot follow; use peft lora, rslora, dora or miss, or quant none"
            )
        init = self.peft_config.get("init_lora_weights", True)
        if init not in (True, False, "gaussian", "orthogonal"):
            found.append(
                f"peft_config: init_lora_weights={init!r} changes the base's weights, which are "
                "only referred to; --peft pissa does that in a way that can be taken up again"
            )
        found += [
            f"peft_config: {name} makes an adapter that cannot be merged: leave it out"
            for name in ("lora_bias", "alora_invocation_tokens")
            if self.peft_config.get(name)
        ]
        if self.kind == "pissa":
            found += [
                f"peft_config: {name} cannot be had with pissa, whose components have one scale"
                for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
                if self.peft_config.get(name)
            ]
        twice = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "target_modules": self.targets or None,
            "modules_to_save": self.train_modules or None,
        }
        found += [
            f"peft_config says {name} too: give it once"
            for name, value in twice.items()
            if value is not None and name in self.peft_config
        ]
        return found

    @property
    def rank(self) -> int:
        return self.r or int(self.peft_config.get("r", R))

    @property
    def target_modules(self) -> str | list[str]:
        """As peft takes them: a regular expression, or ends of names."""
        if not self.targets:
            given: str | list[str] = self.peft_config.get("target_modules", TARGETS)
            return given
        if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", self.targets):
            return _split(self.targets)
        return self.targets

    @property
    def modules_to_save(self) -> list[str] | None:
        return _split(self.train_modules) or self.peft_config.get("modules_to_save")

    @property
    def reads_base_weights(self) -> bool:
        """Whether it computes with the base's matrices themselves, not only with their products."""
        return self.kind == "dora" or bool(self.peft_config.get("use_dora"))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def check_pattern(pattern: str) -> None:
    """UserError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"lora_targets={pattern!r} is no regular expression: {error}") from None
