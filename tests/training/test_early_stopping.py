"""`training.patience`: no better validation for so long ends the run, and it stays ended until the option changes."""

from __future__ import annotations

from pathlib import Path

from roadwork.monitoring.runlog import read_lines
from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures

UNCHANGED = ["--training.learning_rate=1e-30", "--training.validate_every_steps=1"]
"""No step changes a weight, so every validation gives the same numbers."""


def test_without_a_better_validation_the_run_ends_and_a_relaunch_does_not_go_on(trainer: Make, tmp_path: Path) -> None:
    def steps(file: str) -> list[int]:
        return [line["step"] for line in read_lines(tmp_path / "run" / f"{file}.jsonl")]

    for _ in range(2):
        counters = trainer(*UNCHANGED, "--training.patience=1").run()
        assert (counters.step, counters.best_step, counters.stale_validations, counters.finished) == (2, 1, 1, True)
        assert steps("metrics") == steps("validation") == [1, 2]
    counters = trainer(*UNCHANGED, "--training.patience=2").run()  # more patience: it goes on where it ended
    assert (counters.step, counters.stale_validations, counters.finished) == (3, 2, True)
    assert steps("metrics") == steps("validation") == [1, 2, 3]
