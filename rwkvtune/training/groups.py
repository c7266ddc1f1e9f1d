"""Which parameters learn faster and which decay, as RWKV-LM sorts them. No torch here: what a file
holds is told by the same rules.

Source: RWKV-LM, `configure_optimizers` of RWKV-v5 and train_temp.
"""

from __future__ import annotations

from collections.abc import Iterable

LR_SCALES = {"1x": 1.0, "2x": 2.0, "3x": 3.0, "decay": 1.0}
STAGE2_LR_SCALES = {"1x": 1.0, "2x": 5.0, "3x": 5.0, "decay": 1.0}
"""Upstream's stage 2 warms up the small parameters of a model that took over another's matrices."""


def group_of(name: str, shape: Iterable[int], *, decays: bool, stage2: bool = False) -> str:
    """Group of one parameter, "1x", "2x", "3x" or "decay"; the first rule that fits wins.

    decays: whether weight decay is on; without it matrices are ordinary parameters.
    """

    def has(*parts: str) -> bool:
        return any(part in name for part in parts)

    if has("_w1", "_w2"):
        return "1x"
    if has("time_sta") and decays:
        return "decay"
    if has("time_mix", "time_maa"):
        return "2x" if stage2 else "1x"
    if has("time_decay", "time_daaaa", "att.w0"):
        return "3x" if stage2 else "2x"
    if has("time_faaaa"):
        return "2x" if stage2 else "1x"
    if has("time_first"):
        return "3x"
    if decays and has(".weight") and sum(n != 1 for n in shape) >= 2:
        return "decay"
    return "1x"
