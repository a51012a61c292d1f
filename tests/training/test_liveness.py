"""The run folder's lock between real processes, and who is said to hang."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from roadwork.errors import UserError
from roadwork.training.liveness import Heartbeat, RunLock, lock_run

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


class Peers:
    """Two ranks that start one after the other: what the first broadcasts, the second gets."""

    def __init__(self) -> None:
        self.is_main, self.told = True, None

    def broadcast_object(self, thing: str | None) -> str | None:
        self.told = thing if self.is_main else self.told
        return self.told


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_ends_every_rank_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("roadwork.training.liveness.fcntl.flock", refused)
    line = f"{tmp_path}: no file locks ({os.strerror(number)}); put run.dir on a file system with flock"
    peers = Peers()
    for peers.is_main in (True, False):
        with pytest.raises(UserError) as refusal:
            lock_run(peers, tmp_path)  # type: ignore[arg-type]
        assert str(refusal.value) == line


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
