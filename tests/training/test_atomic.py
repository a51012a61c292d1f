"""A folder that takes another's place is whole whenever its writer is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roadwork.training.atomic import mend_folder, replace_folder, write_atomic

WRITER = """
import sys
from pathlib import Path
from roadwork.training.atomic import replace_folder
def fill(new, text):
    for name in ("one", "two", "three"):
        (new / name).write_text(text)
count = 0
while True:
    count += 1
    replace_folder(Path(sys.argv[1]), lambda new: fill(new, str(count)))
    if count == 1:
        print("ready", flush=True)
"""


def test_a_kill_at_any_instant_leaves_one_whole_folder(tmp_path: Path) -> None:
    best = tmp_path / "best"
    for attempt in range(100 if os.environ.get("ROADWORK_DRILL") == "long" else 8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(best)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(0.003 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        mend_folder(best)
        assert len({(best / name).read_text() for name in ("one", "two", "three")}) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_cannot_be_filled_leaves_the_old_one(tmp_path: Path) -> None:
    best = tmp_path / "best"
    replace_folder(best, lambda new: write_atomic(new / "a", "old"))

    def full(new: Path) -> None:
        (new / "a").write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        replace_folder(best, full)
    assert (best / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_without_an_exchange_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    (tmp_path / ".old-best").mkdir()
    (tmp_path / ".old-best" / "a").write_text("old")
    (tmp_path / ".new-best").mkdir()
    mend_folder(tmp_path / "best")
    assert (tmp_path / "best" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
