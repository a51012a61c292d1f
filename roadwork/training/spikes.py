"""Losses that stand out, so that a person can look at the photos behind them."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 64
"""Losses that say what is usual."""
ENOUGH = 16
"""Below this many nothing is usual yet."""


class Spikes:
    """Judges each step's loss by the median and the median deviation of the last WINDOW ones.

    A relaunch begins with an empty window. A spike does not enter it: one bad shard must not become usual.

    Args:
        factor: how many median deviations above the median a loss stands out; 0: never.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def usual(self, loss: float) -> float | None:
        """The median that `loss` stands out from; None where it does not. A loss that is not finite is not judged."""
        if not self.factor or not math.isfinite(loss):
            return None
        if len(self._losses) >= ENOUGH:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(value - median) for value in self._losses)
            if loss > median + self.factor * max(deviation, 1e-3 * abs(median)):
                return median
        self._losses.append(loss)
        return None
