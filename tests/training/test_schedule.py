"""The learning rate is a function of the optimizer step."""

from types import SimpleNamespace

import pytest

from roadwork.config import Config, LossConfig
from roadwork.training.loop import Trainer
from roadwork.training.schedule import cosine_with_warmup


def test_warmup_ends_at_the_peak_and_the_run_at_the_floor() -> None:
    rates = [cosine_with_warmup(step, 1000, 50, 0.01) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50)
    assert rates[49] == rates[50] == 1.0
    assert rates[-1] == pytest.approx(0.01)
    assert all(a <= b for a, b in zip(rates[:49], rates[1:50], strict=True))
    assert all(a >= b for a, b in zip(rates[50:-1], rates[51:], strict=True))


def test_warmup_never_takes_more_than_a_tenth_of_a_short_run() -> None:
    assert cosine_with_warmup(2, 20, 500, 0.0) == 1.0


def test_halfway_of_the_cosine() -> None:
    assert cosine_with_warmup(50, 101, 0, 0.2) == pytest.approx(0.6)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_tiny_runs_have_a_finite_positive_rate(total: int) -> None:
    assert all(0 < cosine_with_warmup(step, total, 500, 0.01) <= 1 for step in range(total))


@pytest.mark.parametrize(
    ("steps", "step", "factor"),
    [(100, 0, 0.01), (100, 49, 0.5), (100, 99, 1.0), (100, 5000, 1.0), (1, 0, 1.0), (0, 0, 1.0)],
)
def test_the_consistency_term_is_ramped_from_the_first_step_to_the_last_of_the_ramp(
    steps: int, step: int, factor: float
) -> None:
    config = Config(loss=LossConfig(consistency_ramp_steps=steps))
    assert Trainer._ramp(SimpleNamespace(config=config), step) == pytest.approx(factor)  # type: ignore[arg-type]
