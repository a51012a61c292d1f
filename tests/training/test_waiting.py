"""What a step's line says of waiting for data is what was waited."""

from __future__ import annotations

import time

import pytest

from roadwork.data.ranges import RangeReader
from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures

PAUSE_S = 0.02


def test_a_slow_disk_shows_as_waiting(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lower bound by what was slept, and never more than the step took: true however busy the machine is."""
    made, read, reads = trainer(), RangeReader.read, [0]
    batches = iter(made.data.train_loader(made.engine, made.config, 0))

    def slow(self: RangeReader, number: int, offset: int, size: int) -> bytes:
        reads[0] += 1
        time.sleep(PAUSE_S)
        return read(self, number, offset, size)

    monkeypatch.setattr(RangeReader, "read", slow)
    for step in range(2):
        reads[0] = 0
        record, _ = made.optimizer_step(step, batches)
        assert reads[0] >= 4, "two micro-batches of two photos"
        assert 0.99 * PAUSE_S * reads[0] <= record["data_wait_s"] <= record["step_s"]
