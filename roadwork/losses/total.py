"""The sum of the terms, each divided by its count over the whole optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roadwork.config import LossConfig
from roadwork.config_ranges import check_loss
from roadwork.errors import UserError
from roadwork.losses.auxiliary import WeatherLoss
from roadwork.losses.consistency import Pooling, ViewConsistencyLoss, ViewSupervision
from roadwork.losses.focal import IGNORE, FocalLoss
from roadwork.losses.masked import Number, hide, masked_mean, upcast
from roadwork.losses.segmentation import SegmentationLoss

TERMS = ("loss", "focal", "consistency", "view", "weather", "segmentation", "view_labels", "balance")
"""The loss and all that it can be the sum of, as metrics.jsonl names them; a term that a run has not is 0 there."""
_WEIGHED = ("focal", "consistency", "weather", "segmentation")
"""Those whose weights the sketch gave, in its order."""


@dataclass
class Counts:
    """Valid elements over a WHOLE optimizer step: all processes, all micro-batches.

    A mean of means over processes is wrong as soon as they hold different numbers of labels; sums over one count are
    not. Numbers, or 0-d tensors on any device (nothing here reads them on the host).
    """

    label: Number
    """Labelled photos."""
    weather: Number
    """Photos whose weather is known."""
    views: Number
    """Photos with at least two kept views."""
    segmentation: Number
    """Valid (photo, kept view, class) triples."""
    view_labels: Number = 0.0
    """Kept views of photos whose masks are valid for every class."""
    parts: Number = 1.0
    """Processes times micro-batches whose losses are summed: the balance term, one per part, is divided by it."""

    @staticmethod
    def local(label: Tensor, weather: Tensor, kept_views: Tensor, masks_valid: Tensor, weight: Tensor) -> Tensor:
        """float64 [5] (label, weather, views, segmentation, view labels) of one micro-batch; all-reduce their sum per step.

        Args:
            label, weather: [B] int64, -100 unknown.
            kept_views: [B] views that pruning keeps of each photo (ceil(keep_ratio * V)).
            masks_valid: [B, 6] bool.
            weight: [B]; 0 means the photo is not there.
        """
        here = weight > 0
        kept = kept_views * here
        return torch.stack(
            [
                ((label != IGNORE) & here).sum(),
                ((weather != IGNORE) & here).sum(),
                (kept >= 2).sum(),
                (kept[:, None] * masks_valid).sum(),
                (kept * masks_valid.all(1)).sum(),
            ]
        ).to(torch.float64)

    @classmethod
    def of(cls, vector: Tensor, parts: float = 1.0) -> Counts:
        """From the reduced vector of `local`; one read on the host if it lives on the CPU, none otherwise."""
        values: Any = vector.tolist() if vector.device.type == "cpu" else vector.unbind()
        return cls(values[0], values[1], values[2], values[3], values[4], parts)


@dataclass
class Targets:
    """What a micro-batch is compared with."""

    label: Tensor
    """[B] int64: 0, 1, or -100 for unknown."""
    weather: Tensor
    """[B] int64: 0..7, or -100 for NULL."""
    masks: Tensor | None
    """[B, V, 6, h, w] {0, 1} for ALL views (the loss takes the kept ones), or None."""
    masks_valid: Tensor
    """[B, 6] bool: classes for which the photo has masks."""
    weight: Tensor
    """[B]: 0 where the photo is not there (past the end, unreadable), else 1."""
    counts: Counts | None = None
    """Over the whole optimizer step; None: counted from this batch."""


class TotalLoss(nn.Module):
    """focal + view consistency + weather + segmentation + balance.

    Each term is a sum over this batch's valid elements over the step's count, so that the sum of `loss` over all
    processes and micro-batches is the step's loss. A term that the whole step has nothing for is left out, and the
    others' weights grow so that their sum stays. Of the consistency weight, the share `view_supervision` goes to the
    label against pooled view logits (counted with the labels, not ramped: agreement must not come before knowledge).

    Args:
        weights: a LossConfig; or the weights of focal, consistency, weather and segmentation alone, as four numbers or a
            mapping of these names: nothing else is added then. None: LossConfig().

    Raises:
        UserError: other weights.
    """

    def __init__(
        self,
        weights: LossConfig | Mapping[str, float] | Sequence[float] | None = None,
        pooling: Pooling = "attention",
    ) -> None:
        super().__init__()
        self.config = config = _config(weights)
        check_loss(config)
        self.focal = FocalLoss(config.gamma, config.alpha, config.label_smoothing)
        self.consistency = ViewConsistencyLoss(config.temperature)
        self.view_supervision = ViewSupervision(pooling)
        self.weather = WeatherLoss()
        self.segmentation = SegmentationLoss()

    def weights(self, counts: Counts) -> dict[str, Number]:
        """Weight of each term after the absent ones are left out; sums to what the configured ones sum to.

        Numbers, or 0-d tensors where the counts are.
        """
        c = self.config
        wanted = {
            "focal": (c.focal, counts.label),
            "view": (c.consistency * c.view_supervision, counts.label),
            "consistency": (c.consistency * (1 - c.view_supervision), counts.views),
            "weather": (c.weather, counts.weather),
            "segmentation": (c.segmentation, counts.segmentation),
        }
        kept = {name: weight * _present(count) for name, (weight, count) in wanted.items()}
        total, left = sum(weight for weight, _ in wanted.values()), sum(kept.values())
        if isinstance(left, Tensor):
            scale: Number = total / left.clamp_min(1e-12)
        else:
            scale = total / left if left else 0.0
        return {name: weight * scale for name, weight in kept.items()}

    def forward(self, outputs: Any, targets: Targets, ramp: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this batch (0-d, fp32) and its terms, detached, before their weights.

        Args:
            outputs: `logits` [B, 2], `view_logits` [B, K, 2], `view_mask` and `kept` [B, K], `weather_logits` [B, 8],
                `seg_logits` [B, K, 6, h, w] or None, `balance` 0-d or None, and `attention` [B, K] where there is one.
            ramp: factor on the consistency term in [0, 1].
        """
        valid, masks = _kept_masks(outputs, targets)
        here = targets.weight > 0
        counts = targets.counts or self._counts(outputs, targets, valid)
        terms = {
            "focal": self.focal(outputs.logits, targets.label, here, counts.label),
            "consistency": self.consistency(outputs.view_logits, outputs.view_mask, here, counts.views),
            "view": self.view_supervision(
                outputs.view_logits,
                targets.label,
                outputs.view_mask,
                getattr(outputs, "attention", None),
                here,
                counts.label,
            ),
            "weather": self.weather(outputs.weather_logits, targets.weather, here, counts.weather),
            "segmentation": self._segmentation(outputs, masks, valid, counts.segmentation),
        }
        weights = self.weights(counts)
        weights["consistency"] = weights["consistency"] * ramp
        terms["view_labels"] = self._view_labels(outputs, masks, valid, counts.view_labels)
        weights["view_labels"] = self.config.view_labels
        terms["balance"] = self._balance(outputs, counts)
        weights["balance"] = self.config.balance
        loss = torch.stack([terms[name] * weight for name, weight in weights.items()]).sum()
        return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    def _counts(self, outputs: Any, targets: Targets, valid: Tensor) -> Counts:
        here = targets.weight > 0
        return Counts(
            label=((targets.label != IGNORE) & here).sum(),
            weather=((targets.weather != IGNORE) & here).sum(),
            views=((outputs.view_mask.sum(1) >= 2) & here).sum(),
            segmentation=valid.sum(),
            view_labels=valid.all(-1).sum(),
        )

    def _segmentation(self, outputs: Any, masks: Tensor | None, valid: Tensor, count: Number) -> Tensor:
        if outputs.seg_logits is None:
            return _zero(outputs.logits)
        if masks is None:
            return _zero(outputs.seg_logits)
        loss: Tensor = self.segmentation(outputs.seg_logits, masks, valid, count)
        return loss

    def _view_labels(self, outputs: Any, masks: Tensor | None, valid: Tensor, count: Number) -> Tensor:
        """Cross entropy of the view head where the masks say which views show roadwork (all classes valid).

        A photo's label does not say which of its views shows the object; multiple-instance pooling alone learns that
        slowly, masks know it.
        """
        if masks is None:
            return _zero(outputs.view_logits)
        there = masks > 0.5 if masks.is_floating_point() else masks != 0
        shows, known = there.flatten(2).any(-1).long(), valid.all(-1)
        logits = hide(upcast(outputs.view_logits), known)
        each = nn.functional.cross_entropy(logits.flatten(0, 1), shows.flatten(), reduction="none")
        return masked_mean(each, known.flatten(), count)

    def _balance(self, outputs: Any, counts: Counts) -> Tensor:
        if outputs.balance is None:
            return _zero(outputs.logits)
        return upcast(outputs.balance) / counts.parts


def _config(weights: LossConfig | Mapping[str, float] | Sequence[float] | None) -> LossConfig:
    """The configuration that four weights, by name or in their order, stand for."""
    if weights is None or isinstance(weights, LossConfig):
        return weights or LossConfig()
    if isinstance(weights, Sequence) and not isinstance(weights, str) and len(weights) == len(_WEIGHED):
        weights = dict(zip(_WEIGHED, weights, strict=True))
    if not isinstance(weights, Mapping) or set(weights) != set(_WEIGHED):
        raise UserError(f"loss weights are {weights!r}; give a LossConfig, or the four of {', '.join(_WEIGHED)}")
    four: Any = weights
    return LossConfig(**four, view_supervision=0.0, view_labels=0.0, balance=0.0)


def _present(count: Number) -> Number:
    return (count > 0).to(torch.float32) if isinstance(count, Tensor) else float(count > 0)


def _zero(x: Tensor) -> Tensor:
    """0 with a gradient of zeros, finite also where x is not."""
    return torch.where(torch.zeros_like(x, dtype=torch.bool), upcast(x), 0.0).sum()


def _kept_masks(outputs: Any, targets: Targets) -> tuple[Tensor, Tensor | None]:
    """Validity [B, K, 6] and masks [B, K, 6, h, w] of the kept views; nothing is valid without logits or masks."""
    present = (targets.weight > 0)[:, None] & outputs.view_mask
    valid = present[:, :, None] & targets.masks_valid[:, None, :]
    if targets.masks is None or outputs.seg_logits is None:
        return valid & False, None
    batch = torch.arange(valid.shape[0], device=valid.device)[:, None]
    return valid, targets.masks[batch, outputs.kept]
