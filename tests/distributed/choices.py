"""What a detector chose for each photo: the views that pruning kept, and the experts that each of them went to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Chosen = tuple[list[int], list[list[list[int]]]]
"""Kept views [K], and experts [K, layers, top_k] of each."""


class Choices:
    """Records them by position of the stream, so that runs with other batches can be compared photo by photo.

    Args:
        model: whose forward passes are watched; those without `positions` are not recorded.
    """

    def __init__(self, model: Any) -> None:
        self.of: dict[int, Chosen] = {}
        self.positions: list[int] = []
        """Of the next batch; to be set before each recorded forward pass."""
        self._experts: list[torch.Tensor] = []
        for layer in model.layers:
            layer.moe.register_forward_hook(self._routed)
        model.register_forward_hook(self._decided)

    def _routed(self, moe: Any, given: tuple[Any, ...], result: Any) -> None:
        shares = F.linear(given[0].detach().float(), moe.router.weight.detach().float()).softmax(-1)
        self._experts.append(shares.topk(moe.top_k, dim=-1).indices.sort(-1).values)

    def _decided(self, model: Any, given: tuple[Any, ...], outputs: Any) -> None:
        experts, self._experts = torch.stack(self._experts, 2), []
        positions, self.positions = self.positions, []
        for row, position in enumerate(positions):
            there = outputs.view_mask[row]
            self.of[position] = (outputs.kept[row][there].tolist(), experts[row][there].tolist())
