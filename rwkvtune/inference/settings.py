"""What may be asked of generation. No torch here: wrong values are refused before anything is
loaded."""

from __future__ import annotations

import math

from rwkvtune.errors import UserError


def check_settings(
    temperature: float,
    top_k: int,
    top_p: float,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    *,
    max_tokens: int = 0,
    seed: int | None = None,
) -> None:
    """UserError for values that `sample` and `generate` cannot use."""
    if not 0 <= temperature < math.inf:
        raise UserError(
            f"temperature is {temperature}: give 0 (always the likeliest token) or more"
        )
    if top_k < 0:
        raise UserError(f"top_k is {top_k}: give a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise UserError(
            f"top_p is {top_p}: give a probability above 0, at most 1 (1 = all tokens); "
            "for the likeliest token only, give temperature 0"
        )
    for name, value in (
        ("presence_penalty", presence_penalty),
        ("frequency_penalty", frequency_penalty),
    ):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: give a number, or 0 for none")
    if max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens}: give 0 or more")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise UserError(f"seed is {seed}: give a whole number that fits into 64 bits")
