"""Which checkpoints stay."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roadwork.training.checkpoint import MARKER, Checkpointer, complete_checkpoints


@pytest.mark.parametrize(("every", "kept"), [(0, [10, 12]), (4, [4, 8, 10, 12]), (6, [6, 10, 12])])
def test_the_newest_and_every_nth_stay(tmp_path: Path, every: int, kept: list[int]) -> None:
    main: Any = SimpleNamespace(is_main=True)
    checkpoints = Checkpointer(main, tmp_path, keep_last=2, keep_every=every)
    for step in range(2, 14, 2):
        checkpoints._write(step, {}, {"step": step})
    assert [int(path.name.removeprefix("step-")) for path in complete_checkpoints(tmp_path)] == kept
    assert all((path / MARKER).is_file() for path in tmp_path.iterdir()), "something half-removed stayed"
