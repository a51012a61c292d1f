"""The range test's arithmetic; the stage itself runs in tests/distributed."""

import math

import pytest

from roadwork.config import LrFinderConfig
from roadwork.training.lr_finder import RangeTest


def sweep(loss: object, options: LrFinderConfig) -> RangeTest:
    test = RangeTest(options)
    for step in range(options.steps):
        rate = test.rate(step)
        if test.add(rate, loss(rate)):  # type: ignore[operator]
            break
    return test


def test_rates_are_spaced_exponentially() -> None:
    test = RangeTest(LrFinderConfig(start=1e-6, end=1.0, steps=7))
    assert [test.rate(i) for i in range(7)] == pytest.approx([10.0**-e for e in (6, 5, 4, 3, 2, 1, 0)])


def test_it_suggests_the_steepest_fall_and_stops_on_divergence() -> None:
    def loss(rate: float) -> float:  # falls fastest around 1e-3, explodes from 0.1 on
        return 1 / (1 + math.exp(4 * (math.log10(rate) + 3))) + 0.05 + (100 * (rate - 0.1) if rate > 0.1 else 0)

    test = sweep(loss, LrFinderConfig(steps=120, smoothing=0.0))
    assert test.suggestion() == pytest.approx(1e-3, rel=0.3)
    assert test.rates[-1] < 1.0


def test_a_nan_stops_it_without_entering_the_curve() -> None:
    test = RangeTest(LrFinderConfig())
    assert not test.add(1e-6, 1.0)
    assert test.add(1e-5, float("nan"))
    assert test.losses == [1.0]


def test_no_suggestion_where_the_loss_never_falls() -> None:
    assert sweep(lambda rate: 1 + rate, LrFinderConfig(steps=30, smoothing=0.0)).suggestion() is None


def test_smoothing_is_bias_corrected() -> None:
    test = RangeTest(LrFinderConfig(smoothing=0.9))
    test.add(1e-6, 2.0)
    assert test.losses[0] == pytest.approx(2.0)
