"""Batch norms with fixed statistics that compute with fp32 statistics and scales whatever the activations' dtype."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn


class FixedStatistics(nn.BatchNorm2d):
    """Always the running statistics. An engine that casts weights to bf16 leaves buffers in fp32; a plain batch norm
    refuses that mixture, and rounding the statistics to bf16 instead would shift every channel."""

    running_mean: Tensor  # never None: no norm of the supported nets goes without statistics
    running_var: Tensor
    folded = False
    """The convolution before does this norm's work already."""

    def normalise(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape and dtype."""
        if self.folded:
            return x
        scale = None if self.weight is None else self.weight.float()
        shift = None if self.bias is None else self.bias.float()
        statistics = (self.running_mean.float(), self.running_var.float())
        return F.batch_norm(x, *statistics, scale, shift, False, 0.0, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """See `normalise`: [B, C, H, W]."""
        return self.normalise(x)


class FixedStatisticsAct(FixedStatistics, BatchNormAct2d):
    """The same with timm's dropout and activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """See `normalise`: [B, C, H, W]."""
        activated: Tensor = self.act(self.drop(self.normalise(x)))
        return activated


def fix_statistics(net: nn.Module) -> None:
    """Turn every 2-d batch norm of a net into one with fixed statistics, in place; names and tensors stay."""
    for module in net.modules():
        if type(module) is BatchNormAct2d:
            module.__class__ = FixedStatisticsAct
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = FixedStatistics
