"""What augmentation is given and must not pass on: pixels that are no fractions, padding full of anything, wrong types."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roadwork.config import AugmentConfig
from roadwork.data.augment import Augment
from roadwork.data.augment_parameters import draw

NAMES = [name for name in vars(AugmentConfig()) if name.endswith("_p")]
QUIET = AugmentConfig(
    **{**dict.fromkeys(NAMES, 1.0), "challenge_p": 0.0, "noise_p": 0.0}
)  # noise goes by a view's number
SIZE = 32


def batch(b: int = 4, v: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(b, v, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.arange(b) * 5 + 2


def on_a_gpu(config: AugmentConfig, views: Tensor, key: Tensor, view_mask: Tensor | None = None) -> Tensor:
    """What a GPU runs, here on a CPU."""
    return Augment._together(views, draw(config, 0, 0, key.numpy()), None, view_mask)[0]


@pytest.mark.parametrize("photo", [0, 3])
@pytest.mark.parametrize("view", [0, 1, 2])
@pytest.mark.parametrize("config", [QUIET, AugmentConfig(probability_scale=0.0), AugmentConfig(challenge_p=1.0)])
def test_one_wrong_pixel_in_any_view_is_refused(photo: int, view: int, config: AugmentConfig) -> None:
    for wrong, told in ((math.nan, "nan to nan"), (math.inf, "to inf"), (-0.5, "-0.5 to"), (255.0, "to 255")):
        views, key = batch()
        views[photo, view, 1, 3, 7] = wrong
        with pytest.raises(ValueError, match=rf"views in \[0, 1\], these range from .*{told}"):
            Augment(config)(views, key, 0, 0)


@pytest.mark.parametrize("config", [QUIET, AugmentConfig(probability_scale=0.0), AugmentConfig(challenge_p=1.0)])
def test_where_nobody_may_look_a_wrong_pixel_is_mended(config: AugmentConfig) -> None:
    views, key = batch()
    views[0, 1, 0, 3, 3], views[1, 2] = math.nan, views[1, 2] * 255
    out = on_a_gpu(config, views, key)
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    clean, _ = batch()
    torch.testing.assert_close(out[2:], on_a_gpu(config, clean, key)[2:], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["cpu", "gpu"])
@pytest.mark.parametrize("config", [QUIET, AugmentConfig(challenge_p=1.0)])
def test_padding_counts_for_nothing_wherever_it_lies_and_whatever_it_holds(form: str, config: AugmentConfig) -> None:
    """Contrast turns about the mean of a photo's first view, so that view must be one that is there."""
    there = torch.tensor([[True, True, True], [False, True, True], [True, False, True], [False, False, False]])

    def augmented(views: Tensor, key: Tensor, view_mask: Tensor | None) -> Tensor:
        if form == "gpu":
            return on_a_gpu(config, views, key, view_mask)
        return Augment(config)(views, key, 0, 0, view_mask=view_mask)[0]

    seen = []
    for padding in (0.0, 0.9, 255.0, math.nan):
        views, key = batch()
        views[~there] = padding
        seen.append(augmented(views, key, there))
        assert (seen[-1][~there] == 0).all() and seen[-1].isfinite().all()
    assert all(torch.equal(seen[0], other) for other in seen)
    views, key = batch()
    if config is QUIET:
        alone = augmented(views[1:2, 1:], key[1:2], None)
        torch.testing.assert_close(seen[0][1:2, 1:], alone, rtol=0, atol=1e-6)


def test_padding_first_is_no_reason_to_refuse_a_photo_without_views() -> None:
    views, key = batch(2)
    views[:] = math.nan
    out, _ = Augment(QUIET)(views, key, 0, 0, view_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": torch.arange(4.0)}, "one key per photo, int64 [4], got torch.float32 [4]"),
        ({"key": torch.ones(4, dtype=torch.bool)}, "got torch.bool [4]"),
        ({"key": [0, 1, 2, 3]}, "one key per photo, int64 [4], got a list"),
        ({"key": torch.arange(3)}, "got torch.int64 [3]"),
        ({"epoch": torch.tensor([1, 2, 3])}, "one epoch, or int64 [4] of them, got torch.int64 [3]"),
        ({"epoch": torch.tensor(1.0)}, "got torch.float32 []"),
        ({"epoch": 0.5}, "got a float"),
        ({"seed": None}, "one whole number as its seed, got a NoneType"),
        ({"views": [[1.0]]}, "views [B, V, 3, S, S], got a list"),
    ],
)
def test_a_wrong_type_or_length_is_named(changes: dict[str, Any], words: str) -> None:
    views, key = batch()
    given: dict[str, Any] = {"views": views, "key": key, "epoch": 0, "seed": 0} | changes
    with pytest.raises(ValueError, match=re.escape(words)):
        Augment(QUIET)(**given)


@pytest.mark.parametrize("epoch", [2, np.int64(2), torch.tensor(2), torch.full((4,), 2)])
def test_an_epoch_may_be_one_number_or_one_per_photo(epoch: Any) -> None:
    views, key = batch()
    assert torch.equal(Augment(QUIET)(views, key, epoch, 0)[0], Augment(QUIET)(views, key.int(), 2, np.int32(0))[0])
