"""A stop signal: where the ranks leave, what is saved then, and that a relaunch ends where an uninterrupted run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roadwork.evaluation import challenge
from roadwork.evaluation.standing import CHUNK
from roadwork.training.checkpoint import Checkpointer, complete_checkpoints
from roadwork.training.loop import Trainer
from roadwork.training.pretrain import closing
from roadwork.training.validation import CHALLENGE_ROUNDS
from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures


class Signalled(Trainer):
    """Gets a SIGTERM as a micro-batch begins."""

    at = (3, 0)

    def _micro_step(self, step: int, micro: int, *given: Any) -> Any:
        if (step, micro) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._micro_step(step, micro, *given)


@pytest.mark.parametrize(("at", "saved"), [((3, 0), 3), ((3, 1), 4), ((0, 0), 0)])
def test_a_step_is_left_between_micro_batches_and_made_again(
    trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], at: tuple[int, int], saved: int
) -> None:
    kind = type("At", (Signalled,), {"at": at})
    stopped = trainer("--monitoring.console=true", kind=kind)
    counters = stopped.run()
    assert counters.step == saved and not counters.finished
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("pretrain stopped after ") and not any("done" in line for line in said)
    told = list(closing(counters, 6, tmp_path / "run"))
    assert told[0] == f"pretrain stopped; launch again to continue at step {saved} of 6"
    assert not any(line.startswith(("best", "next")) for line in told)
    names = [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ([f"step-{saved:08d}"] if saved else [])
    again = trainer()
    assert again.run().finished
    whole = trainer(run=tmp_path / "whole")
    whole.run()
    for name, parameter in whole.masters.parameters.items():
        assert torch.equal(parameter, again.masters.parameters[name]), name


def test_a_run_that_fails_says_so_and_one_that_ends_is_done(trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Trainer):
        def _micro_step(self, step: int, *given: Any) -> Any:
            if step == 2:
                raise RuntimeError("a planned failure")
            return super()._micro_step(step, *given)

    with pytest.raises(RuntimeError, match="a planned failure"):
        trainer("--monitoring.console=true", kind=Failing).run()
    assert capsys.readouterr().err.splitlines()[-1].startswith("pretrain failed after ")
    assert trainer("--monitoring.console=true").run().finished
    assert capsys.readouterr().err.splitlines()[-1].startswith("pretrain done in ")


ONE = """
import os, signal, sys
from roadwork.training.liveness import StopRequest
stop = StopRequest().install()
if "before" in sys.argv:
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.received == signal.SIGUSR2 and stop.anywhere()
with stop.at_once():
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached")
"""


@pytest.mark.parametrize("when", ["before", "within"])
def test_where_nothing_is_unsaved_a_signal_ends_the_process_at_once(when: str) -> None:
    done = subprocess.run([sys.executable, "-c", ONE, when], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == ""
    number = signal.SIGUSR2 if when == "before" else signal.SIGTERM
    assert done.stderr == f"signal {number.value}: left at once, nothing was unsaved\n"


def test_a_signal_ends_the_challenges_questions_too_and_the_ranks_say_meanwhile_that_they_live(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer("--training.select_on=challenge", "--training.validate_every_steps=3")
    beats = []

    def interrupted(network: Any, questions: list[Any], *given: Any) -> Any:
        beats.append(made.heart._state["beats"])
        if len(beats) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        return np.full(len(questions), 0.5)

    monkeypatch.setattr(challenge, "ask", interrupted)
    counters = made.run()
    assert len(beats) == 2 < CHALLENGE_ROUNDS // CHUNK and beats[1] > beats[0]
    assert (counters.step, counters.validated_step, counters.best_step, counters.finished) == (3, -1, -1, False)
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert not (tmp_path / "run" / "best").exists()


def test_a_checkpoint_that_a_full_disk_refused_is_written_when_a_signal_comes(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = Checkpointer._write, []

    def full_once(self: Checkpointer, *given: Any) -> None:
        if not refused:
            refused.append(given[0])
            raise OSError(28, "No space left on device")
        write(self, *given)

    monkeypatch.setattr(Checkpointer, "_write", full_once)
    trainer("--checkpoint.every_steps=3", kind=Signalled).run()
    assert refused == [3]
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
