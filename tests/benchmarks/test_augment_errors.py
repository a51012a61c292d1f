"""The augmentation's table of errors: every op with a counterpart, each near it."""

import pytest
import torch

from benchmarks.augment_errors import max_errors
from roadwork.config import AugmentConfig

WITHOUT = {"rain", "fog", "shadow", "glare", "challenge"}
"""Ops without a counterpart of the same picture; of the challenge's, the JPEG has two."""


def test_every_op_with_a_counterpart_is_near_it() -> None:
    found = max_errors(torch.device("cpu"))
    ops = {name.removesuffix("_p") for name in vars(AugmentConfig()) if name.endswith("_p")} - WITHOUT
    assert {op for op in ops if not any(name.startswith(f"{op}_") for name in found)} == set()
    bounds = {"hue_torchvision": 0.13, "motion_blur_kornia": 0.03, "noise_mean_torchvision": 1e-3}
    bounds |= {"jpeg_torchvision": 0.06, "jpeg_kornia": 0.06}
    for name, error in found.items():
        assert error == pytest.approx(0, abs=bounds.get(name, 5e-4)), name
