"""A tiny random detector, and answers that differ from picture to picture whatever random numbers this machine draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from roadwork.config import ModelConfig
from roadwork.models import RoadworkDetector


def tiny_detector(view_size: int = 64) -> RoadworkDetector:
    """The smallest detector with every part, random weights of seed 0."""
    torch.manual_seed(0)
    shape = ModelConfig(
        backbone="test_vit", weights="random", hidden_dim=32, num_layers=1, num_heads=4, num_kv_heads=2, expert_dim=24,
        segmentation_size=8, prune_after=1,
    )  # fmt: skip
    return RoadworkDetector(shape, view_size)


def spread_answers(detector: RoadworkDetector, pictures: Sequence[Any]) -> RoadworkDetector:
    """Scale and centre the last layer so that the log odds of these pictures have mean 0 and deviation 1."""
    last = detector.classifier[-1]
    with torch.no_grad():
        last.weight.mul_(1 / np.std(odds(detector, pictures)))
        last.bias.mul_(0.0)
        last.bias[0] = float(np.mean(odds(detector, pictures)))
    return detector


def odds(detector: RoadworkDetector, pictures: Sequence[Any]) -> np.ndarray:
    """Log odds [N] of the answers, float64."""
    p = np.array(detector.predict_batch(pictures))
    return np.log(p) - np.log1p(-p)
