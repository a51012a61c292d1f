"""What the ranks know of one optimizer step, put together by one reduction and one reading of the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from roadwork.engine import Engine
from roadwork.losses import TERMS
from roadwork.monitoring.throughput import memory_gib


@dataclass(frozen=True)
class Share:
    """One rank's part of a step.

    terms: float64 [len(TERMS)] on the device, this rank's share of each term of the loss.
    waited_s: seconds for which it waited for photos.
    own_s: seconds in which it was at work or waited for photos: without waiting for other ranks.
    seen, missed: photos that it computed with, and those that could not be read.
    stop: whether it was asked to stop.
    """

    terms: Tensor
    waited_s: float
    own_s: float
    seen: int
    missed: int
    stop: bool


@dataclass(frozen=True)
class Totals:
    """Of all ranks together; the lists have one entry for each rank."""

    terms: dict[str, float]
    squared_norm: float
    seen: int
    missed: int
    stop: bool
    waited_s: list[float]
    own_s: list[float]
    memory_gib: list[float]
    faulty: list[int]
    """Ranks whose loss is not finite."""

    def figures(self) -> dict[str, float]:
        """Names and values for metrics.jsonl."""
        return {
            "data_wait_s": max(self.waited_s),
            "memory_gib": max(self.memory_gib),
            "slowest_rank": int(np.argmax(self.own_s)),
            "slowest_over_median": max(self.own_s) / max(float(np.median(self.own_s)), 1e-9),
            "skipped_samples": self.missed,
        }


def total(engine: Engine, share: Share, squared_norm: Tensor, rest: Tensor) -> tuple[Totals, Tensor]:
    """Add up every rank's share. Collective.

    Args:
        squared_norm: [], this rank's part of the squared norm of the weights.
        rest: float64 [N] on the device, of this rank alone: read with the others, so that the host waits once.

    Returns:
        The totals, and `rest` on the host.
    """
    of_rank = torch.zeros(engine.world_size, 4, dtype=torch.float64, device=engine.device)
    of_rank[engine.rank, :3] = share.terms.new_tensor([share.waited_s, share.own_s, memory_gib(engine.device)])
    of_rank[engine.rank, 3] = ~torch.isfinite(share.terms[0])
    counts = share.terms.new_tensor([share.seen, share.missed, share.stop])
    reduced = engine.all_reduce(torch.cat([share.terms, squared_norm.view(1), counts, of_rank.flatten()]))
    reduced, rest = torch.cat([reduced, rest]).cpu().split([len(reduced), len(rest)])
    terms, (squared, seen, missed, stop), ranks = reduced.split([len(TERMS), 4, of_rank.numel()])
    waited, own, memory, faults = ranks.view(-1, 4).T.tolist()
    totals = Totals(
        dict(zip(TERMS, terms.tolist(), strict=True)), float(squared), int(seen), int(missed), bool(stop), waited, own, memory,
        [rank for rank, fault in enumerate(faults) if fault],
    )  # fmt: skip
    return totals, rest
