"""How fast, and where the time goes: pure functions of counts and seconds, and one meter.

Operations are counted as in the project's measurements: 2 x parameters x tokens + attention for a forward pass of a
plain transformer, three times that for training; pruned views count only while they are present. Heads, augmentation
and recomputation count nothing.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch


def view_operations(parameters: int, tokens: int, depth: int, width: int) -> float:
    """Operations of one view's forward pass through a plain transformer: 2 P T + 4 T^2 D L.

    parameters: of the backbone; tokens: patches and prefix tokens of one view; depth: blocks; width: of a token.
    """
    return 2.0 * parameters * tokens + 4.0 * tokens**2 * width * depth


def pruned_operations(per_view: float, views: float, kept: float, after_block: int, depth: int) -> float:
    """Operations of a photo's forward pass when only `kept` of `views` views run beyond block `after_block`.

    per_view: operations of one view through all blocks. after_block = -1 or depth: pruning saves nothing.
    """
    if after_block == -1:
        after_block = depth
    if not 0 <= after_block <= depth or not 0 < kept <= views:
        raise ValueError(f"cannot keep {kept} of {views} views after block {after_block} of {depth}")
    share = after_block / depth
    return per_view * (views * share + kept * (1 - share))


def training_operations(forward: float, trainable_share: float = 1.0) -> float:
    """Forward and backward: 3 x forward where all blocks train; a frozen share is only run forward.

    trainable_share: share of the blocks, counted from the end, that receive gradients (gradients for inputs and weights
    cost one forward each; blocks below the first trainable one get neither).
    """
    if not 0.0 <= trainable_share <= 1.0:
        raise ValueError(f"trainable_share must lie in [0, 1], got {trainable_share}")
    return forward * (1.0 + 2.0 * trainable_share)


def utilisation(operations: float, seconds: float, ceiling: float) -> float:
    """Share of the ceiling (operations per second of all devices together) that was used: 'MFU'; 0 without time."""
    return operations / seconds / ceiling if seconds > 0 and ceiling > 0 else 0.0


def rate(count: float, seconds: float) -> float:
    """Count per second; 0 without time."""
    return count / seconds if seconds > 0 else 0.0


class SlowestRank(NamedTuple):
    """The rank that others wait for, its seconds, and how many times the median it needs."""

    rank: int
    seconds: float
    over_median: float


def slowest_rank(seconds: Sequence[float]) -> SlowestRank:
    """From every rank's own busy seconds of one step (its compute and its data wait, without waiting for the
    others).
    """
    if not seconds:
        raise ValueError("slowest_rank needs the seconds of at least one rank")
    ordered = sorted(seconds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    rank = max(range(len(seconds)), key=lambda r: seconds[r])
    return SlowestRank(rank, seconds[rank], seconds[rank] / median if median > 0 else 1.0)


def memory_gib(device: torch.device | str = "cpu") -> float:
    """Largest memory used so far, GiB: of the CUDA allocator on that device, else the process's resident memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Meter:
    """Adds up a window of optimizer steps; `read` gives its figures and starts the next window."""

    def __init__(self) -> None:
        self.steps = 0
        self.images = 0.0
        self.seconds = 0.0
        self.data_wait_s = 0.0

    def add(self, images: float, seconds: float, data_wait_s: float) -> None:
        """One optimizer step: photos of ALL ranks, its wall time, and the time that this rank waited for data."""
        self.steps += 1
        self.images += images
        self.seconds += seconds
        self.data_wait_s += data_wait_s

    def read(self) -> dict[str, float]:
        """images_per_s, step_s, data_wait_s (per step) and data_wait_share of the window; empty without steps."""
        if not self.steps:
            return {}
        figures = {
            "images_per_s": rate(self.images, self.seconds),
            "step_s": self.seconds / self.steps,
            "data_wait_s": self.data_wait_s / self.steps,
            "data_wait_share": self.data_wait_s / self.seconds if self.seconds > 0 else 0.0,
        }
        self.__init__()  # type: ignore[misc]
        return figures
