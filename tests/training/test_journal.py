"""What a run writes beside its weights, on a disk that takes no more for a while."""

import errno
import os
from pathlib import Path

import pytest

from roadwork.command_line import parse
from roadwork.training.journal import REOPEN_S, Journal


def test_while_the_disk_is_full_the_events_are_opened_anew_at_most_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("roadwork.training.journal.monotonic", lambda: now[0])
    journal = Journal(parse("pretrain", [f"--run.dir={tmp_path}"]).config, tmp_path, is_main=True, step=0)

    def step(number: int, full: bool) -> int:
        """One step's record; the number of event files after it."""
        with journal.board() as board:
            if full and board.writer is not None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            board.record({"step": number, "loss": 0.5})
        return len(list((tmp_path / "tensorboard").glob("events.*")))

    assert [step(number, full=True) for number in range(40)] == [1] * 40
    now[0] += REOPEN_S
    assert [step(number, full=True) for number in range(40, 80)] == [2] * 40
    assert step(80, full=False) == 2, "there is room again, but the minute is not over"
    now[0] += REOPEN_S
    assert [step(number, full=False) for number in (81, 82)] == [3, 3]
    with journal.board() as board:
        assert board.writer is not None
    journal.close()
