"""Choosing the views that the rest of the backbone looks at."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from roadwork.errors import UserError


def keep_count(valid: int, keep_ratio: float) -> int:
    """ceil(keep_ratio * valid): 12 -> 8 for 2/3. The small constant keeps 0.07 * 100 (7.000000000000001) from becoming 8."""
    return math.ceil(keep_ratio * valid - 1e-9)


def check_keep_ratio(keep_ratio: float) -> float:
    """The ratio, or a UserError."""
    if not 0 < keep_ratio <= 1:
        raise UserError(f"model.keep_ratio is {keep_ratio}; give a share in (0, 1], 1 keeps all views")
    return keep_ratio


class ViewPruner(nn.Module):
    """Scores views by their vector at the pruning depth and keeps the best of each photo.

    A hard choice has no gradient, so the vectors of kept views are multiplied by sigmoid(score) later on (by the
    caller): a view that helps pulls its score up. At first the scores lean towards larger boxes, so that training
    starts with the whole photo kept. DynamicViT (Rao et al. 2021) prunes patches in a like manner.

    Args:
        dim: width of the view vectors at the pruning depth.
        keep_ratio: share of a photo's valid views to keep, rounded up.
    """

    def __init__(self, dim: int, keep_ratio: float, inner: int = 64) -> None:
        super().__init__()
        self.keep_ratio = check_keep_ratio(keep_ratio)
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, 1))
        self.area = nn.Parameter(torch.ones(1))

    def score(self, vectors: Tensor, boxes: Tensor) -> Tensor:
        """Vectors [N, D] and boxes [N, 4] (fractions) -> fp32 scores [N]."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp_min(0).sqrt()
        scores: Tensor = self.net(vectors)
        return scores.squeeze(-1).float() + self.area.float() * (side - 0.5)

    def choose(self, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The best views of each photo, in ascending order.

        Args:
            scores: [B, V].
            mask: bool [B, V] on any device, at least one valid view per photo.

        Returns:
            kept int64 [B, K] on the scores' device with K = ceil(keep_ratio * V); bool [B, K] on the mask's device,
            False in slots beyond a photo's own ceil(keep_ratio * valid) (their `kept` is 0).
        """
        views = scores.shape[1]
        slots = keep_count(views, self.keep_ratio)
        wanted = torch.ceil(mask.sum(1).double() * self.keep_ratio - 1e-9).long()
        kept_mask = torch.arange(slots, device=mask.device) < wanted[:, None]
        hidden = scores.detach().masked_fill(~mask.to(scores.device), -math.inf)
        order = hidden.argsort(dim=1, descending=True, stable=True)[:, :slots]
        there = kept_mask.to(scores.device)
        kept = order.masked_fill(~there, views).sort(dim=1).values
        return kept.masked_fill(~there, 0), kept_mask
