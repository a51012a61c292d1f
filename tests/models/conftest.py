"""Tiny detectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from roadwork.config import ModelConfig
from roadwork.models import RoadworkDetector

SIZE = 64


@pytest.fixture
def build() -> Callable[..., RoadworkDetector]:
    """A tiny detector with random weights; keyword arguments override the configuration."""

    def make(view_size: int = SIZE, seed: int = 0, **changes: Any) -> RoadworkDetector:
        options: dict[str, Any] = {
            "backbone": "test_vit",
            "weights": "random",
            "prune_after": 2,
            "hidden_dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "expert_dim": 24,
            "segmentation_size": 16,
        }
        torch.manual_seed(seed)
        return RoadworkDetector(ModelConfig(**{**options, **changes}), view_size)

    return make


@pytest.fixture
def photos() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Random views [B, V, 3, S, S], mask and boxes for photos with the given numbers of views."""

    def make(
        counts: list[int], size: int = SIZE, views: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        most = max(counts)
        pixels = torch.rand(len(counts), most, 3, size, size, generator=generator)
        corner = torch.rand(len(counts), most, 2, generator=generator) * 0.5
        boxes = torch.cat([corner, corner + 0.3], dim=-1)
        boxes[:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        mask = torch.arange(most)[None] < torch.tensor(counts)[:, None]
        return pixels * mask[:, :, None, None, None], mask, boxes * mask[:, :, None]

    return make
