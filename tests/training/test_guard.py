"""Steps that are not as they should be: some in a row end the run with what was before, and a jump is noted with its photos."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from roadwork.errors import UserError
from roadwork.monitoring.runlog import read_lines
from roadwork.training.checkpoint import Checkpointer, complete_checkpoints
from roadwork.training.loop import Trainer
from roadwork.training.spikes import ENOUGH
from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures


class Scaled(Trainer):
    """Multiplies the loss of some steps, and notes which photos each step had."""

    factors: dict[int, float]

    def _micro_step(self, step: int, micro: int, batch: Any, counts: Any) -> Any:
        self.photos = getattr(self, "photos", {})
        self.photos.setdefault(step, []).extend(self.data.train.names(batch.sample.numpy()))
        healthy, factor = self.loss, self.factors.get(step, 1.0)

        def scaled(*given: Any) -> Any:
            loss, terms = healthy(*given)
            return loss * factor, {**terms, "loss": terms["loss"] * factor}

        self.loss = scaled
        try:
            return super()._micro_step(step, micro, batch, counts)
        finally:
            self.loss = healthy


def scaled(**factors: float) -> type[Scaled]:
    return type("Some", (Scaled,), {"factors": {int(step[1:]): factor for step, factor in factors.items()}})


def test_losses_that_are_not_finite_end_the_run_with_a_checkpoint_from_before_them(
    trainer: Make, tmp_path: Path
) -> None:
    run, nan = tmp_path / "run", float("nan")
    for _ in range(2):  # a relaunch meets the same photos, and leaves the checkpoint as it is
        with pytest.raises(UserError, match=r"^3 steps in a row .* at step 5 .*; the checkpoint is from before: lower"):
            trainer("--checkpoint.every_steps=100", kind=scaled(s2=nan, s3=nan, s4=nan)).run()
        (saved,) = complete_checkpoints(run / "checkpoints")
        counters = json.loads((saved / "counters.json").read_text())
        assert (saved.name, counters["samples_seen"], counters["nonfinite_steps"]) == ("step-00000002", 8, 0)
    again = trainer()  # whatever was wrong has been mended
    assert again.run().finished
    whole = trainer(run=tmp_path / "whole")
    whole.run()
    for name, parameter in whole.masters.parameters.items():
        assert torch.equal(parameter, again.masters.parameters[name]), name


def test_a_loss_that_stands_out_is_noted_with_the_photos_of_its_step(trainer: Make, tmp_path: Path) -> None:
    made = trainer("--training.max_steps=3", kind=scaled(s1=1000.0))
    for loss in range(ENOUGH):
        made.spikes.usual(1 + loss / ENOUGH)
    made.run()
    (line,) = read_lines(tmp_path / "run" / "spikes.jsonl")
    assert line["step"] == 2 and line["loss"] > 100 > line["usual"]
    assert sorted(line["photos"]) == sorted(made.photos[1]) and len(line["photos"]) == 4
    assert sorted(line["photos"]) != sorted(made.photos[0]) != sorted(made.photos[2])


def test_no_step_writes_out_the_names_of_all_photos(trainer: Make) -> None:
    """Done once per step, it would take longer than the step from some ten thousand photos on."""
    made = trainer("--training.max_steps=2")
    made.run()
    assert "id" not in vars(made.data.train)


def test_a_launch_that_is_refused_leaves_the_runs_options_alone(trainer: Make, tmp_path: Path) -> None:
    trainer("--training.max_steps=1").run()
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="with seed 0, this launch has 5"):
        trainer("--training.max_steps=1", "--seed=5")
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_run_whose_last_checkpoint_is_not_on_disk_has_not_finished(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Checkpointer, "_write", full)
        with pytest.raises(UserError, match="the last checkpoint could not be written"):
            trainer("--training.max_steps=1").run()
    assert trainer("--training.max_steps=1").run().finished
