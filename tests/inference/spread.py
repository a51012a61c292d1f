"""A random detector whose answers differ from picture to picture, whatever random numbers this machine draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from roadwork.models import RoadworkDetector


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
