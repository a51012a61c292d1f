"""A queue of folds over processes: whoever is free takes the next one; a dead process's fold is free again.

A claim is an exclusive `flock` on `fold-K.lock`. The kernel drops it when its holder dies, so nothing has to judge
whether a claim is stale, on this launch or the next.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork.errors import UserError
from roadwork.models.fold_files import is_done

if TYPE_CHECKING:  # the queue itself needs no torch
    from roadwork.engine import Engine


@contextmanager
def claim(folder: Path, fold: int) -> Iterator[bool]:
    """Try to hold a fold; yields whether this process holds it. Freed at the end, and by the kernel on any death."""
    with _hold(folder / f"fold-{fold}.lock") as mine:
        yield mine


@contextmanager
def one_job_at_a_time(engine: Engine, folder: Path, poll_s: float = 0.5) -> Iterator[None]:
    """Jobs that share a run folder (the tasks of an array) fill `folder` one after the other. Collective.

    Rank 0 holds the lock for its job. Waiting is a broadcast per try, so that no collective outlives its time-out.
    """
    with ExitStack() as stack:
        while True:
            mine = stack.enter_context(_hold(folder.with_name(f"{folder.name}.lock"))) if engine.is_main else None
            if engine.broadcast_object(mine):
                break
            stack.close()
            time.sleep(poll_s)
        yield


@contextmanager
def _hold(path: Path) -> Iterator[bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise UserError(
                    f"the file system of {path.parent} has no file locks (flock); put run.dir on one that has, "
                    "or mount this one with them"
                ) from None
            raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield True
    finally:
        os.close(handle)


def take_folds(folder: Path, number: int, first: int = 0, poll_s: float = 0.2) -> Iterator[int]:
    """Folds for this process to do, one at a time, until ALL folds are done by someone.

    The caller marks a fold done (`fold-K/COMPLETE`) before it asks for the next. Processes start at different folds
    (`first`, the rank) so that they rarely meet. Returns only when every fold is complete: while others still work,
    it waits, and takes over what a dead process leaves.
    """
    while True:
        taken = False
        for step in range(number):
            fold = (first + step) % number
            if is_done(folder, fold):
                continue
            with claim(folder, fold) as mine:
                # Between the look above and the claim its former holder may have finished it.
                if mine and not is_done(folder, fold):
                    taken = True
                    yield fold
        if all(is_done(folder, fold) for fold in range(number)):
            return
        if not taken:
            time.sleep(poll_s)
