"""Focal loss (Lin et al. 2017, arXiv 1708.02002), in its softmax and its sigmoid form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadwork.config_ranges import BELOW_ONE, FOCUS, SHARE, WEIGHT
from roadwork.errors import UserError
from roadwork.losses.masked import Number, hide, masked_mean, upcast

IGNORE = -100
_TINY = 1e-12  # below it (1 - p) ** gamma has an infinite slope for gamma < 1


def check_labels(target: Tensor, valid: Tensor, classes: int, loss: str) -> None:
    """ValueError for labels [B] that are no class where `valid` [B]; their values are read on a CPU only (no sync)."""
    if target.is_floating_point():
        raise ValueError(f"{loss} needs integer labels, got {target.dtype}")
    if target.device.type != "cpu" or valid.device.type != "cpu":
        return
    known = target.numpy()[valid.numpy()]
    wrong = known[(known < 0) | (known >= classes)]
    if len(wrong):
        raise ValueError(f"{loss} got the label {wrong[0]}; allowed: 0 to {classes - 1}, and {IGNORE} for unknown")


class FocalLoss(nn.Module):
    """Softmax focal loss with label smoothing and a weight per class.

    With t the smoothed one-hot target, t_c = (1 - s) [c = y] + s / C, and p the softmax:

        L = - sum_c alpha_c t_c (1 - p_c) ** gamma log p_c

    gamma 0 and alpha 1 is `F.cross_entropy(logits, target, label_smoothing=s)`. The modulating factor uses the
    prediction only, not the smoothed target. The mean is over labelled photos, not over the sum of alpha.

    Args:
        gamma: focusing parameter, >= 0.
        alpha: weight of each class (C numbers, >= 0); one number a in [0, 1] is (1 - a, a) of the negative and the positive
            class, as in the sigmoid form; None for ones.
        label_smoothing: s in [0, 1).

    Raises:
        UserError: another gamma, alpha or label_smoothing.
    """

    def __init__(
        self, gamma: float = 2.0, alpha: float | Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        FOCUS.check("focal gamma", gamma)
        BELOW_ONE.check("label_smoothing", label_smoothing)
        self.gamma = float(gamma)
        self.alpha = None if alpha is None else _class_weights(alpha)
        self.label_smoothing = float(label_smoothing)

    def elements(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each photo [B]; `target` must lie in 0..C-1."""
        classes = logits.shape[-1]
        log_p = F.log_softmax(logits, -1)
        smooth = self.label_smoothing
        # t_c = s/C + (1-s) [c = y]; a comparison instead of one_hot, which checks the range on the host
        hot = torch.arange(classes, device=logits.device) == target.unsqueeze(-1)
        goal = hot.to(log_p.dtype) * (1 - smooth) + smooth / classes
        loss = -goal * log_p
        if self.alpha is not None and any(a != 1.0 for a in self.alpha):
            # built from Python numbers as C small kernels: a tensor made from a list would be a blocking copy
            loss = torch.stack([loss[..., c] * a for c, a in enumerate(self.alpha)], -1)
        if self.gamma:
            loss = loss * (-torch.expm1(log_p)).clamp_min(_TINY) ** self.gamma
        return loss.sum(-1)

    def forward(
        self, logits: Tensor, target: Tensor, present: Tensor | None = None, count: Number | None = None
    ) -> Tensor:
        """Mean over labelled photos.

        Args:
            logits: [B, C], any float type.
            target: [B] int64 in 0..C-1, or -100 for unknown.
            present: [B] bool; photos that are there at all. None: all.
            count: labelled photos of the whole optimizer step. None: of this batch.

        Raises:
            ValueError: other shapes, or labels that are no class (as `check_labels`).
            UserError: `alpha` weighs another number of classes.
        """
        if logits.dim() != 2 or target.shape != logits.shape[:1]:
            raise ValueError(
                f"focal loss needs logits [B, C] and target [B], got {list(logits.shape)} and {list(target.shape)}"
            )
        if self.alpha is not None and len(self.alpha) != logits.shape[1]:
            raise UserError(
                f"focal alpha has {len(self.alpha)} weights for {logits.shape[1]} classes; give one per class"
            )
        valid = target != IGNORE if present is None else (target != IGNORE) & present
        check_labels(target, valid, logits.shape[1], "focal loss")
        logits = hide(upcast(logits), valid)
        return masked_mean(self.elements(logits, torch.where(valid, target, 0)), valid, count)


def _class_weights(alpha: float | Sequence[float]) -> tuple[float, ...]:
    if not isinstance(alpha, Iterable):
        SHARE.check("focal alpha", alpha)
        return 1.0 - float(alpha), float(alpha)
    weights = tuple(alpha)
    for weight in weights:
        WEIGHT.check("focal alpha", weight)
    return tuple(map(float, weights))


def sigmoid_focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss per element, as torchvision.ops.sigmoid_focal_loss(reduction="none").

    Args:
        logits: any shape.
        target: the same shape, 0 or 1 (or soft).
        alpha: weight of positives in [0, 1], negatives weigh 1 - alpha; negative: no weighting.
    """
    logits = upcast(logits)
    target = target.to(logits.dtype)
    p = torch.sigmoid(logits)
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = ce * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    return loss * (alpha * target + (1 - alpha) * (1 - target)) if alpha >= 0 else loss
