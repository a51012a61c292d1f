"""Masks of roadwork objects from patch tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 6


def _groups(width: int) -> int:
    return next(g for g in (8, 4, 2, 1) if width % g == 0)


class SegmentationDecoder(nn.Module):
    """Patch tokens of one view -> logits of 6 classes.

    Pooled vectors hold no places, so masks come from patch tokens: mixed at their own resolution (where it is
    cheap), enlarged, sharpened. GroupNorm: the number of views in a batch must not matter.

    Args:
        dim: channels C of the patch tokens. size: side of the predicted masks.
    """

    def __init__(self, dim: int, size: int, inner: int = 128) -> None:
        super().__init__()
        self.size = size
        half = inner // 2
        self.mix = nn.Sequential(
            nn.Conv2d(dim, inner, 1, bias=False),
            nn.GroupNorm(_groups(inner), inner),
            nn.GELU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.GroupNorm(_groups(inner), inner),
            nn.GELU(),
            nn.Conv2d(inner, half, 1),
        )
        self.sharpen = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=half), nn.GELU())
        self.out = nn.Conv2d(half, NUM_CLASSES, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """[N, C, h, w] -> logits [N, 6, size, size]."""
        x = F.interpolate(self.mix(patches), size=(self.size, self.size), mode="bilinear", align_corners=False)
        logits: Tensor = self.out(x + self.sharpen(x))
        return logits
