"""Which checkpoints stay, and that one which is written again is never lost."""

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roadwork.training import checkpoint
from roadwork.training.checkpoint import MARKER, Checkpointer, complete_checkpoints


def of(folder: Path, keep_last: int = 2, keep_every: int = 0) -> Checkpointer:
    main: Any = SimpleNamespace(is_main=True)
    return Checkpointer(main, folder, keep_last, keep_every)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("every", "kept"), [(0, [10, 12]), (4, [4, 8, 10, 12]), (6, [6, 10, 12])])
def test_the_newest_and_every_nth_stay(tmp_path: Path, every: int, kept: list[int]) -> None:
    checkpoints = of(tmp_path, keep_every=every)
    for step in range(2, 14, 2):
        checkpoints._write(step, {}, {"step": step})
    assert [int(path.name.removeprefix("step-")) for path in complete_checkpoints(tmp_path)] == kept
    assert all((path / MARKER).is_file() for path in tmp_path.iterdir()), "something half-removed stayed"


def test_killed_while_the_only_checkpoint_is_written_again_it_comes_back(tmp_path: Path) -> None:
    """The last step's is: once on its turn, once with what the end adds."""
    of(tmp_path, keep_last=1)._write(4, {}, {"step": 4})

    def killed() -> None:
        checkpoint.write_atomic = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        of(tmp_path, keep_last=1)._write(4, {}, {"step": 4, "finished": True})

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and complete_checkpoints(tmp_path) == []
    of(tmp_path).clean()
    assert names(tmp_path) == ["step-00000004"] and checkpoint.damage(tmp_path / "step-00000004") is None


def test_a_disk_that_is_full_just_before_the_end_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of(tmp_path)._write(4, {}, {"step": 4})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(OSError):
        of(tmp_path)._write(4, {}, {"step": 4, "finished": True})
    assert names(tmp_path) == ["step-00000004"] and checkpoint.damage(tmp_path / "step-00000004") is None
