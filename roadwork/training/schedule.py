"""The learning rate as a function of the optimizer step."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, total: int, warmup: int, floor: float) -> float:
    """Factor on the peak learning rate for optimizer step `step`, counted from 0.

    Linear warm-up reaches 1 at step `warmup`, a cosine falls to `floor` at the last step. A function, not a state: it
    depends neither on the number of processes nor on accumulation, and a resumed run continues on the same curve.

    Args:
        step: 0 .. total - 1.
        total: optimizer steps of the run.
        warmup: steps of warm-up; at most a tenth of the run is used.
        floor: factor at the end, in [0, 1].
    """
    warmup = min(warmup, max(1, total // 10)) if warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
