"""Dice + binary cross entropy on pseudo-masks, only where they are valid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadwork.losses.masked import Number, hide, masked_mean, upcast

CLASSES = 6
"""Classes of objects that masks show."""


def coverage(masks: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Masks [..., h, w] at another size, as the share of each cell that the class covers, in [0, 1].

    Integers count as bits: any value but 0 is 'there' (0/255 and class numbers cannot push Dice out of its range).
    """
    masks = masks.clamp(0, 1).to(dtype) if masks.is_floating_point() else (masks != 0).to(dtype)
    if masks.shape[-2:] == size:
        return masks
    flat = masks.reshape(-1, 1, *masks.shape[-2:])
    return F.adaptive_avg_pool2d(flat, size).reshape(*masks.shape[:-2], *size)


class SegmentationLoss(nn.Module):
    """(1 - Dice) + BCE of each valid (photo, view, class) triple, averaged over valid triples.

    Dice = (2 sum p t + smooth) / (sum p + sum t + smooth) over the pixels of the triple (Milletari et al. 2016,
    with sums instead of squares), in (0, 1]; BCE is the mean over the triple's pixels. Every triple weighs the same.
    """

    def __init__(self, smooth: float = 1.0) -> None:
        super().__init__()
        self.smooth = float(smooth)

    def elements(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each triple [...] from logits and targets [..., h, w]."""
        p = torch.sigmoid(logits)
        overlap = (p * target).sum((-2, -1))
        size = p.sum((-2, -1)) + target.sum((-2, -1))
        dice = (2 * overlap + self.smooth) / (size + self.smooth)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((-2, -1))
        return 1 - dice + bce

    def forward(
        self, logits: Tensor, target: Tensor, valid: Tensor | None = None, count: Number | None = None
    ) -> Tensor:
        """Mean over valid triples.

        Args:
            logits: [B, V, C, h, w].
            target: [B, V, C, H, W], {0, 1} of any type or coverage in [0, 1]; brought to h x w by area. A triple with a
                NaN in it is not known and does not count.
            valid: [B, V, C] bool. None: all.
            count: valid triples of the whole optimizer step. None: of this batch.

        Raises:
            ValueError: other shapes, or a `valid` that is not bool.
        """
        sizes = (*logits.shape[:2], CLASSES)
        if not (logits.dim() == target.dim() == 5) or not (logits.shape[:3] == target.shape[:3] == sizes):
            raise ValueError(
                f"segmentation loss needs logits [B, V, C, h, w] and target [B, V, C, H, W], C = {CLASSES}, "
                f"got {list(logits.shape)} and {list(target.shape)}"
            )
        if valid is None:
            valid = torch.ones(logits.shape[:3], dtype=torch.bool, device=logits.device)
        if valid.shape != logits.shape[:3] or valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool {list(logits.shape[:3])}, got {valid.dtype} {list(valid.shape)}")
        if target.is_floating_point():
            valid = valid & ~target.isnan().flatten(3).any(-1)
        logits = hide(upcast(logits), valid)
        goal = hide(coverage(target, (logits.shape[-2], logits.shape[-1]), logits.dtype), valid)
        return masked_mean(self.elements(logits, goal), valid, count)
