"""Exponential moving average of the fp32 master weights, sharded like the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from roadwork.training.masters import Masters


class Average:
    """`average = d * average + (1 - d) * master` after each optimizer step, on the partition that this rank owns.

    The decay warms up as `min(decay, (1 + t) / (10 + t))` with t the applied steps, so that a short run does not
    validate its initial weights.

    Args:
        masters: the fp32 weights.
        decay: final decay in [0, 1); 0 follows the weights.
    """

    def __init__(self, masters: Masters, decay: float) -> None:
        self.masters = masters
        self.decay = decay
        self.updates = 0
        self.flats: list[Tensor] = [flat.detach().clone() for flat in masters.flats()]

    @torch.no_grad()
    def update(self) -> None:
        """Take one applied optimizer step in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.flats, [flat.detach() for flat in self.masters.flats()], 1 - decay)

    def whole(self) -> dict[str, Tensor]:
        """The average as whole fp32 tensors by parameter name, shaped like the parameters. Collective."""
        return dict(self.masters.gather(self.flats))

    def load(self, whole: dict[str, Tensor], updates: int) -> None:
        """Continue from whole tensors, shaped like the parameters, after `updates` optimizer steps."""
        for name in self.masters.parameters:
            self.masters.scatter(name, self.flats, whole[name])
        self.updates = updates

    def distance(self) -> float:
        """Relative distance ||average - master|| / ||master|| over all ranks. Collective, synchronises the host."""
        engine = self.masters.engine
        pairs = list(zip(self.flats, self.masters.flats(), strict=True))
        apart = torch.stack([(a - m.detach()).square().sum() for a, m in pairs]).sum()
        length = torch.stack([m.detach().square().sum() for _, m in pairs]).sum()
        sums = torch.stack([apart, length])
        if engine.sharded:
            engine.all_reduce(sums)
        return float((sums[0] / sums[1].clamp_min(1e-30)).sqrt())
