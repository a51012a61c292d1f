"""Operations that a backbone executes in a training step, the numerator of 'MFU'.

A ViT is counted by the formula of `roadwork.monitoring.throughput.view_operations`. A convolutional net has no such
formula: torch counts its convolutions and matrix products. Pruned views count while they are present; heads, augmentation
and recomputation count nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from roadwork.models.backbone import Backbone
from roadwork.monitoring.throughput import view_operations


@dataclass(frozen=True)
class BackboneOperations:
    """Operations of one view's forward pass, before and behind the pruning, and how much of each trains.

    Attributes:
        before, behind: operations of the units before and behind the pruning; stem and tail belong to first and last.
        trained_before, trained_behind: those of them that lie in units with gradients.
        counted: True where torch counted them, False where the formula did.
    """

    before: float
    behind: float
    trained_before: float
    trained_behind: float
    counted: bool

    def training(self, views: float, kept: float) -> float:
        """Forward and backward of `views` views of which `kept` go on: a trained unit costs three forward passes."""
        before = self.before + 2 * self.trained_before
        return views * before + kept * (self.behind + 2 * self.trained_behind)

    def forward(self, views: float, kept: float) -> float:
        """Forward alone."""
        return views * self.before + kept * self.behind


def backbone_operations(backbone: Backbone, view_size: int, prune_unit: int) -> BackboneOperations:
    """Count one view of `view_size` pixels.

    Args:
        prune_unit: units that see every view; the rest see the kept ones.
    """
    units = _formula(backbone, view_size) if backbone.vit else _counted(backbone, view_size)
    first_trained = backbone.depth - backbone.trainable_units
    trained = [ops if i >= first_trained else 0.0 for i, ops in enumerate(units)]
    return BackboneOperations(
        before=sum(units[:prune_unit]),
        behind=sum(units[prune_unit:]),
        trained_before=sum(trained[:prune_unit]),
        trained_behind=sum(trained[prune_unit:]),
        counted=not backbone.vit,
    )


def _formula(backbone: Backbone, view_size: int) -> list[float]:
    """Every parameter of the net spread evenly over the blocks."""
    tokens = (view_size // backbone.stride) ** 2 + int(backbone.net.num_prefix_tokens)
    parameters = sum(p.numel() for p in backbone.net.parameters())
    whole = view_operations(parameters, tokens, backbone.depth, backbone.dim)
    return [whole / backbone.depth] * backbone.depth


@torch.no_grad()
def _counted(backbone: Backbone, view_size: int) -> list[float]:
    """One view through each unit."""
    training = backbone.training
    backbone.eval()
    parameter = next(backbone.parameters())
    counts: list[float] = []
    with FlopCounterMode(display=False) as counter:
        state = backbone.begin(torch.zeros(1, 3, view_size, view_size, device=parameter.device))
        for unit in range(backbone.depth):
            state = backbone.run(state, unit, unit + 1)
            counts.append(float(counter.get_total_flops()))
        backbone.finish(state)
        counts[-1] = float(counter.get_total_flops())
    backbone.train(training)
    return [after - before for before, after in zip([0.0, *counts], counts, strict=False)]
