"""The libraries' lists do what ours does, as often: else a ratio of their speeds would say nothing."""

from __future__ import annotations

import pytest

from benchmarks.augment import CONFIG, TORCHVISION_HAS, kornia_list, torchvision_list

GEOMETRY = ["flip", "rotation", "perspective", "zoom"]
COLOURS = ["brightness", "contrast", "saturation", "hue"]
END = ["noise", "motion_blur", "gaussian_blur"]


def of_ours(ops: list[str]) -> list[float]:
    """Probabilities of these ops."""
    return [getattr(CONFIG, f"{op}_p") for op in ops]


@pytest.mark.parametrize("plasma", [True, False])
def test_kornias_calls_are_as_frequent(plasma: bool) -> None:
    ops = [*GEOMETRY, *COLOURS, "rain", *(["shadow", "glare"] if plasma else []), *END]
    assert [op.p for op in kornia_list(64, plasma).children()] == of_ours(ops)
    every = {name.removesuffix("_p") for name in vars(CONFIG) if name.endswith("_p")}
    assert every - set(ops) - {"shadow", "glare"} == {"fog", "challenge"}, "which kornia does not have"


def test_torchvisions_calls_are_as_frequent() -> None:
    assert [op.p for op in torchvision_list(64).transforms] == of_ours(TORCHVISION_HAS)
    assert [*GEOMETRY, *COLOURS, "noise", "gaussian_blur"] == TORCHVISION_HAS
