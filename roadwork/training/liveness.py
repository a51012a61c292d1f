"""What keeps a run alive and alone: stop signals, the run folder's lock, heartbeats and a watchdog for hung ranks."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from roadwork.engine import Engine
from roadwork.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Stopped(Exception):
    """All ranks left an optimizer step or a judgement unfinished: weights and optimizer are those of the step before."""


class StopRequest:
    """Remembers SIGTERM, SIGUSR2 and SIGINT; the loop asks between micro-batches, so that all ranks stop at the same one."""

    def __init__(self) -> None:
        self.received: int = 0
        self._nothing_unsaved = False
        self._group: Any = None

    def install(self) -> StopRequest:
        """Handle the signals in this process. A handler only sets a flag: saving inside one could tear anything."""
        for number in SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._nothing_unsaved:
            self._leave()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, nothing is unsaved and no word between ranks is possible: a signal ends this process with status 0."""
        self._nothing_unsaved = True
        try:
            if self.received:
                self._leave()
            yield
        finally:
            self._nothing_unsaved = False

    def _leave(self) -> NoReturn:
        os.write(2, f"signal {self.received}: left at once, nothing was unsaved\n".encode())
        os._exit(0)

    def join(self, engine: Engine) -> None:
        """Make `anywhere` possible between processes. Collective.

        The votes go over the host network: on the device they would wait for its whole queue. UserError where the ranks
        cannot reach each other over it.
        """
        if engine.world_size == 1:
            return
        try:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=engine.timeout_s))
        except RuntimeError as error:
            raise UserError(
                f"ranks cannot reach each other over gloo ({error}); set GLOO_SOCKET_IFNAME to the network interface that "
                "joins the nodes"
            ) from None

    def anywhere(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all. Collective; no device waits."""
        vote = torch.tensor(float(bool(self.received)))
        if self._group is not None:
            dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._group)
        return bool(vote)


class RunLock:
    """Exclusive use of a run folder by one job; the kernel frees it when the holder dies, however it dies.

    Args:
        folder: the run folder.
        wait_s: how long to wait for a dying holder.
    """

    def __init__(self, folder: Path, wait_s: float = 30.0) -> None:
        self.path = folder / "lock"
        self.wait_s = wait_s
        self._file: Any = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: the folder is in use, by the host and pid that the line names; it cannot be written, or its file
                system has no file locks.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; stop what holds it or give another --run.dir"
            ) from None
        deadline = time.monotonic() + self.wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "another job"
                    file.close()
                    raise UserError(
                        f"{self.path.parent} is in use by {holder}; stop that job or give another --run.dir"
                    ) from None
                time.sleep(0.2)
            except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP
                file.close()
                raise UserError(
                    f"{self.path.parent}: no file locks ({error.strerror}); put run.dir on a file system with flock"
                ) from None
        file.truncate(0)
        file.write(f"host {socket.gethostname()} pid {os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the folder back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def lock_run(engine: Engine, folder: Path) -> RunLock:
    """Rank 0 takes the lock; every rank raises the same UserError where it cannot be had. Collective."""
    lock = RunLock(folder)
    fault = None
    if engine.is_main:
        try:
            lock.acquire()
        except UserError as error:
            fault = str(error)
    fault = engine.broadcast_object(fault)
    if fault:
        raise UserError(fault)
    return lock


class Heartbeat:
    """Writes what this rank does, and ends the process when it stays in one phase for too long.

    The file `RUN/ranks/rank-NNNN.json` names host, pid, step, phase and time, so that a person or a batch script can see
    which rank hangs where, and whom to signal. All ranks beat in the same sequence: when a collective waits for too long,
    the ranks with the fewest beats are the ones that hang (of those, the ones that are in no collective), and the others
    say so.

    Args:
        folder: the run folder.
        rank: this process.
        world_size: number of processes.
        timeout_s: silence that counts as hung; all threads' stacks are then written to `RUN/ranks/rank-NNNN.stacks`.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout_s: float) -> None:
        self.path = _rank_file(folder, rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rank, self.world_size = rank, world_size
        self.timeout_s = timeout_s
        self._state: dict[str, Any] = {"beats": 0, "step": -1, "phase": "start"}
        self._beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._write()
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Say that this rank is alive and what it begins."""
        self._state = {"beats": self._state["beats"] + 1, "step": step, "phase": phase}
        self._beat = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._write()
            if time.monotonic() - self._beat > self.timeout_s:
                self._give_up()

    def _write(self) -> None:
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "rank": self.rank,
            **self._state,
            "waits": _in_collective(),
            "silent_s": round(time.monotonic() - self._beat, 1),
            "time": time.time(),
        }
        try:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(record))
            temporary.replace(self.path)
        except OSError:
            return  # a full disk must not end the run from here

    def _give_up(self) -> None:
        waits = _in_collective()  # now: a peer that leaves first breaks the collective
        try:
            time.sleep(2.0)  # until every rank's last beat is in its file
            line = self._verdict(waits)
            sys.stderr.write(line)
            sys.stderr.flush()
            with open(self.path.with_suffix(".stacks"), "w") as file:
                file.write(line)
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(75)

    def _verdict(self, waits: bool) -> str:
        """One line: who hangs, as far as the ranks' files tell; `waits`: whether this rank is in a collective."""
        mine = {**self._state, "waits": waits}
        known = [mine if rank == self.rank else self._read(rank) for rank in range(self.world_size)]
        fewest = min(state["beats"] for state in known)
        behind = [rank for rank, state in enumerate(known) if state["beats"] == fewest]
        behind = [rank for rank in behind if not known[rank].get("waits")] or behind
        where = f"{mine['phase']} of step {mine['step']}"
        if self.rank in behind:
            return (
                f"rank {self.rank} ({socket.gethostname()}, pid {os.getpid()}) hangs in {where} for "
                f"{self.timeout_s:.0f} s: it stops, so that the job can be started again\n"
            )
        named = ", ".join(
            f"rank {rank} ({known[rank].get('host', '?')}, pid {known[rank].get('pid', '?')}) in "
            f"{known[rank]['phase']} of step {known[rank]['step']}"
            for rank in behind
        )
        return f"rank {self.rank} waited {self.timeout_s:.0f} s in {where} for {named}, and stops\n"

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            state = json.loads(_rank_file(self.path.parent.parent, rank).read_text())
            return {"beats": 0, "step": -1, "phase": "start", **state}
        except (OSError, ValueError):
            return {"beats": 0, "step": -1, "phase": "an unknown place"}

    def close(self) -> None:
        """Stop watching; the file stays as the last word."""
        self._stop.set()
        self._thread.join(timeout=5)
        self._write()


def _in_collective() -> bool:
    """Whether this process's main thread is inside torch.distributed, that is: waits for others."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if f"torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank-{rank:04d}.json"
