"""Agreement of a photo's views: Jensen-Shannon divergence, and the label for the shared view head."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadwork.config_ranges import ABOVE_ZERO
from roadwork.losses.focal import IGNORE, check_labels
from roadwork.losses.masked import Number, hide, masked_mean, upcast

Pooling = Literal["attention", "noisy_or", "max", "mean"]


class ViewConsistencyLoss(nn.Module):
    """Jensen-Shannon divergence of the views' class distributions (Lin 1991), in nats.

        p_i = softmax(z_i / T),   m = mean_i p_i,   JSD = mean_i KL(p_i || m)

    in [0, ln C]; 0 where all views agree, but for rounding (up to 2e-7 in fp32, never below 0). The gradient through m
    is zero (the p_i sum to V m, and m sums to 1), so detaching m, as is often done, changes nothing. Photos with fewer
    than two views have nothing to agree on and do not count. All views must come from ONE shared head: after pruning, a
    view's place says nothing of its content.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        ABOVE_ZERO.check("consistency temperature", temperature)
        self.temperature = float(temperature)

    def elements(self, view_logits: Tensor, view_mask: Tensor) -> Tensor:
        """JSD of each photo [B]; 0 for photos without a view."""
        log_p = F.log_softmax(view_logits / self.temperature, -1)
        views = view_mask.sum(1).clamp_min(1).to(log_p.dtype)
        p = hide(log_p.exp(), view_mask)
        mean = p.sum(1, keepdim=True) / views[:, None, None]
        log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        divergence = hide(p * (log_p - log_mean), view_mask).sum((1, 2)) / views
        return divergence.clamp_min(0)  # rounding

    def forward(
        self,
        view_logits: Tensor,
        view_mask: Tensor | None = None,
        present: Tensor | None = None,
        count: Number | None = None,
    ) -> Tensor:
        """Mean over photos with at least two views.

        Args:
            view_logits: [B, V, C].
            view_mask: [B, V] bool, true for real (kept) views. None: all.
            present: [B] bool; photos that are there at all. None: all.
            count: such photos of the whole optimizer step. None: of this batch.

        Raises:
            ValueError: other shapes, or a mask that is not bool.
        """
        if view_logits.dim() != 3:
            raise ValueError(f"view consistency needs view_logits [B, V, C], got {list(view_logits.shape)}")
        view_mask = _checked_mask(view_logits, view_mask)
        valid = view_mask.sum(1) >= 2
        if present is not None:
            valid = valid & present
        view_mask = view_mask & valid[:, None]
        logits = hide(upcast(view_logits), view_mask)
        return masked_mean(self.elements(logits, view_mask), valid, count)


def pool_views(
    view_logits: Tensor, view_mask: Tensor | None = None, attention: Tensor | None = None, how: Pooling = "attention"
) -> Tensor:
    """Logits of the photo from the logits of its views (multiple-instance learning).

    `attention`: sum_i a_i z_i with the model's attention over views, renormalised over real views (Ilse et al. 2018,
    arXiv 1802.04712; without attention: the mean). `noisy_or`: P(roadwork) = 1 - prod_i (1 - p_i), two classes only.
    `max`: the logits of the view that is surest of roadwork. `mean`: of the logits.

    Args:
        view_logits: [B, V, 2].
        view_mask: [B, V] bool. None: all.
        attention: [B, V] >= 0.

    Returns: [B, 2]; finite also for photos without a view.
    """
    view_mask = _checked_mask(view_logits, view_mask)
    logits = hide(upcast(view_logits), view_mask)
    margin = logits[..., 1] - logits[..., 0]
    if how == "noisy_or":
        none = hide(F.logsigmoid(-margin), view_mask).sum(1)  # log prod (1 - p)
        none = none.clamp_max(-torch.finfo(none.dtype).tiny)
        return torch.stack([none, torch.log(-torch.expm1(none))], -1)
    if how == "max":
        lowest = torch.finfo(margin.dtype).min
        best = torch.where(view_mask, margin, lowest).argmax(1)
        return logits.gather(1, best[:, None, None].expand(-1, 1, 2)).squeeze(1)
    weight = torch.ones_like(margin) if attention is None or how == "mean" else upcast(attention).to(margin.dtype)
    weight = hide(weight, view_mask)
    total = weight.sum(1, keepdim=True)
    # views that attention ignores altogether (an underflow) would divide 0 by 0
    weight = weight / total.clamp_min(torch.finfo(total.dtype).tiny)
    return (weight.unsqueeze(-1) * logits).sum(1)


class ViewSupervision(nn.Module):
    """Cross entropy of the label against pooled view logits: without it, agreeing on nothing is cheapest."""

    def __init__(self, how: Pooling = "attention") -> None:
        super().__init__()
        self.how = how

    def forward(
        self,
        view_logits: Tensor,
        target: Tensor,
        view_mask: Tensor | None = None,
        attention: Tensor | None = None,
        present: Tensor | None = None,
        count: Number | None = None,
    ) -> Tensor:
        """Mean over labelled photos; shapes as in `pool_views`, target [B] with -100 for unknown."""
        valid = target != IGNORE if present is None else (target != IGNORE) & present
        check_labels(target, valid, view_logits.shape[-1], "view supervision")
        pooled = pool_views(hide(view_logits, valid), view_mask, attention, self.how)
        log_p = F.log_softmax(hide(pooled, valid), -1)
        loss = -log_p.gather(1, torch.where(valid, target, 0)[:, None]).squeeze(1)
        return masked_mean(loss, valid, count)


def _checked_mask(view_logits: Tensor, view_mask: Tensor | None) -> Tensor:
    if view_mask is None:
        return torch.ones(view_logits.shape[:2], dtype=torch.bool, device=view_logits.device)
    if view_mask.shape != view_logits.shape[:2] or view_mask.dtype != torch.bool:
        raise ValueError(
            f"view_mask must be bool {list(view_logits.shape[:2])}, got {view_mask.dtype} {list(view_mask.shape)}"
        )
    return view_mask
