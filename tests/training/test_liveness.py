"""The run folder's lock between real processes, and who is said to hang."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from roadwork.errors import UserError
from roadwork.training.liveness import Heartbeat, RunLock

HOLD = """
import sys, time
from pathlib import Path
from roadwork.training.liveness import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_in_one_line_until_the_holder_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refusal:
            RunLock(tmp_path, wait_s=0.3).acquire()
        assert f"pid {holder.pid}" in str(refusal.value) and "\n" not in str(refusal.value)
        os.kill(holder.pid, signal.SIGKILL)
        lock = RunLock(tmp_path, wait_s=30)
        lock.acquire()
        assert f"pid {os.getpid()}" in (tmp_path / "lock").read_text()
        lock.release()
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(("beats", "words"), [((5, 4), "waited 600 s in forward of step 1 for rank 1"),
                                              ((4, 5), "rank 0 ("), ((4, 4), "rank 0 (")])  # fmt: skip
def test_the_rank_that_is_behind_hangs(tmp_path: Path, beats: tuple[int, int], words: str) -> None:
    hearts = [Heartbeat(tmp_path, rank, 2, 600) for rank in range(2)]
    for heart, count in zip(hearts, beats, strict=True):
        for _ in range(count):
            heart.beat(1, "forward")
        heart.close()
    assert words in hearts[0]._verdict(waits=False)
    assert hearts[0]._verdict(waits=False).count("\n") == 1
