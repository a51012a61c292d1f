"""The range test's arithmetic, and a stop signal; on two processes: tests/distributed/test_find_lr.py."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from roadwork import pipeline
from roadwork.config import LrFinderConfig
from roadwork.training import lr_finder
from roadwork.training.liveness import SIGNALS
from roadwork.training.loop import Trainer
from roadwork.training.lr_finder import RangeTest, find_learning_rate
from tests.training.small_trainer import options, plain_engine, sheets  # noqa: F401 - fixtures


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


@pytest.mark.parametrize("at", [(2, 0), (2, 1)], ids=["within a step", "after a step"])
def test_a_stop_signal_leaves_no_curve_that_the_pipeline_takes_for_a_whole_one(
    at: tuple[int, int], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Signalled(Trainer):
        def _micro_step(self, step: int, micro: int, *given: Any) -> Any:
            if (step, micro) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._micro_step(step, micro, *given)

    config = options(tmp_path, shards, "--lr_finder.steps=4", "--monitoring.console=true")
    for name in ("lr_finder.json", "lr_finder.png"):
        (tmp_path / name).write_text("of an earlier test")
    monkeypatch.setattr(lr_finder, "Trainer", Signalled)
    monkeypatch.setattr(lr_finder, "quiet_libraries", lambda path: None)
    monkeypatch.setattr(lr_finder.Engine, "start", lambda config, *given, **named: plain_engine(config))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert find_learning_rate(config) is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capsys.readouterr()
    assert f"find_lr stopped after {2 + at[1]} steps; launch again to do it anew\n" in said.out
    assert said.err.splitlines()[-1].startswith("find_lr stopped after ") and "done" not in said.err
    assert not list(tmp_path.glob("lr_finder.*")) and not pipeline._ended(config, "find_lr")
