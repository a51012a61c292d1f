"""Weather as an auxiliary task: it keeps features that tell rain from roadwork."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadwork.losses.focal import IGNORE, check_labels
from roadwork.losses.masked import Number, hide, masked_mean, upcast

CLASSES = 8
"""Kinds of weather that the data set knows."""


class WeatherLoss(nn.Module):
    """Cross entropy over weather classes; NULLs (-100) are left out, and a batch of NULLs gives a 0 with a gradient."""

    def forward(
        self, logits: Tensor, target: Tensor, present: Tensor | None = None, count: Number | None = None
    ) -> Tensor:
        """Mean over photos whose weather is known.

        Args:
            logits: [B, 8].
            target: [B] int64 in 0..7, or -100 for NULL.
            present: [B] bool; photos that are there at all. None: all.
            count: such photos of the whole optimizer step. None: of this batch.

        Raises:
            ValueError: other shapes, or labels that are no class (as `check_labels`).
        """
        if logits.dim() != 2 or logits.shape[1] != CLASSES or target.shape != logits.shape[:1]:
            raise ValueError(
                f"weather loss needs logits [B, 8] and target [B], got {list(logits.shape)} and {list(target.shape)}"
            )
        valid = target != IGNORE if present is None else (target != IGNORE) & present
        check_labels(target, valid, logits.shape[1], "weather loss")
        log_p = F.log_softmax(hide(upcast(logits), valid), -1)
        loss = -log_p.gather(1, torch.where(valid, target, 0)[:, None]).squeeze(1)
        return masked_mean(loss, valid, count)
