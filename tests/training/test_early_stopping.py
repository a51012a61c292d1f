"""`training.patience`: no better validation for so long ends the run, and it stays ended until the option changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from roadwork.errors import UserError
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


def test_a_finished_run_is_not_given_options_that_it_was_not_trained_with(trainer: Make, tmp_path: Path) -> None:
    kept = tmp_path / "run" / "config.yaml"
    trainer("--training.max_steps=2").run()
    before = kept.read_text()
    words = r"model\.dropout 0\.1 \(now 0\.5\), training\.learning_rate 0\.\d+ \(now 7e-05\): give"
    with pytest.raises(UserError, match=f"run is finished, trained with {words}"):
        trainer("--training.max_steps=2", "--model.dropout=0.5", "--training.learning_rate=7e-5")
    assert kept.read_text() == before
    assert trainer("--training.max_steps=2", "--training.micro_batch=4").run().step == 2, "weights do not depend on it"
    assert trainer("--training.max_steps=3", "--training.learning_rate=7e-5").run().step == 3, "that is trained"
