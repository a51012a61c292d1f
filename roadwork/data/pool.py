"""Loader processes and the memory they share with the training process."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import roadwork
from roadwork.data.cache import ShardCache
from roadwork.data.ranges import RangeReader
from roadwork.data.slots import SlotLayout
from roadwork.data.worker import HEADER, read_rows

logger = logging.getLogger(__name__)

HELD = 2
"""Batches that the training process may hold in shared memory; further ones are copied out."""
_MAX_RESTARTS = 3
_POLL_MS = 500
_STOP_S = 10.0
_MESSAGE = 1 << 17


@dataclass
class Job:
    """One batch on its way: which slot it fills and which chunks are still out."""

    number: int
    slot: int
    views: int
    chunks: dict[int, bytes]
    names: list[str]
    failed: list[tuple[int, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Why shards could not be read: the batch is then not what it should be."""


@dataclass
class Lease:
    """A slot that a batch's tensors still show. Events mark copies to a device that may still read from it."""

    slot: int
    events: list[Any] = field(default_factory=list)


class DecodePool:
    """Decodes batches ahead in `workers` processes (0: in this one), in the order in which they are submitted.

    Slots are allocated once; a decoded batch's tensors ARE the slot, and the slot is used again when the last of them
    is gone. A worker that dies is replaced together with its siblings and the unfinished work is done again; the result
    does not depend on it.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        layout: SlotLayout,
        *,
        workers: int,
        ahead: int,
        pin: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        self.layout, self.workers, self.ahead = layout, workers, ahead
        self._paths = [os.fspath(path) if cache else os.path.abspath(path) for path in paths]
        self._cache = cache
        self._slots = ahead + HELD
        self._memory_fd = os.memfd_create("roadwork-batches", os.MFD_CLOEXEC)
        os.ftruncate(self._memory_fd, self._slots * layout.slot_bytes)
        self._memory = np.frombuffer(mmap.mmap(self._memory_fd, self._slots * layout.slot_bytes), dtype=np.uint8)
        self._unpin = _pin(self._memory) if pin else None
        self._free: deque[Lease] = deque(Lease(slot) for slot in range(self._slots))
        self._held: set[int] = set()
        self._jobs: dict[int, Job] = {}
        self._submitted = 0
        self._backlog: deque[bytes] = deque()
        self._restarts = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._reader = RangeReader(self._paths, cache=cache) if not workers else None
        self._end = weakref.finalize(self, _stop, self._processes)
        if workers:
            self._start()

    # -- submitting -----------------------------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """Whether another batch may be submitted."""
        return len(self._jobs) < self.ahead and bool(self._free)

    def submit(self, tasks: npt.NDArray[Any], views: int, names: list[str]) -> Job:
        """Start a batch of TASK records [n] padded to `views` views; `names` are its photos' ids for messages."""
        lease = self._free.popleft()
        for event in lease.events:
            event.synchronize()
        size = min(-(-len(tasks) // max(self.workers, 1)), 64)
        job = Job(self._submitted, lease.slot, views, {}, names)
        for chunk, first in enumerate(range(0, len(tasks), size)):
            head = np.asarray([(job.number, chunk, job.slot, views)], dtype=HEADER)
            job.chunks[chunk] = head.tobytes() + tasks[first : first + size].tobytes()
        self._submitted += 1
        self._jobs[job.number] = job
        if self._reader is not None:
            arrays = self.layout.arrays(self._slot(job.slot), views)
            job.failed, job.faults = read_rows(tasks, self._reader, self.layout, arrays)
            job.chunks = {}
        elif self._died():  # looked at here too: its siblings would go on alone, at part of the speed
            self._restart()
        else:
            self._backlog.extend(job.chunks.values())
            self._flush()
        return job

    def _flush(self) -> None:
        while self._backlog:
            try:
                self._tasks.send(self._backlog[0])
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionError):
                return  # every worker is dead: the next wait restarts them
            self._backlog.popleft()

    # -- collecting -----------------------------------------------------------------------------------------------

    def result(self, job: Job) -> tuple[dict[str, torch.Tensor], list[tuple[int, str]], Lease | None]:
        """Wait for a batch: its tensors, (row, reason) of what failed, and the lease of its slot (None: copied out).

        Names and shapes are those of `SlotLayout.arrays`: `views` [B, V, S, S, 3] and what else was wanted.
        """
        while job.chunks:
            self._receive()
        del self._jobs[job.number]
        raw = self._slot(job.slot)
        lease = None
        if len(self._held) < HELD:
            self._held.add(job.slot)
            lease = Lease(job.slot)
            weakref.finalize(raw, self._release, lease).atexit = False
        else:
            raw = raw.copy()
            self._free.append(Lease(job.slot))
        whole = torch.from_numpy(raw)
        tensors = {}
        for name, array in self.layout.arrays(raw, job.views).items():
            start = array.__array_interface__["data"][0] - raw.__array_interface__["data"][0]
            flat = whole[start : start + array.nbytes]
            tensors[name] = (flat.view(torch.float32) if name == "text" else flat).view(array.shape)
        return tensors, sorted(job.failed), lease

    def _slot(self, slot: int) -> npt.NDArray[np.uint8]:
        size = self.layout.slot_bytes
        return np.frombuffer(self._memory, dtype=np.uint8, count=size, offset=slot * size)

    def _release(self, lease: Lease) -> None:
        """The last tensor of a batch is gone (in whichever thread: every step here is atomic)."""
        self._held.discard(lease.slot)
        if self._unpin is not None and torch.cuda.is_initialized():
            event = torch.cuda.Event()
            event.record()
            lease.events.append(event)
        self._free.append(lease)

    def _receive(self) -> None:
        self._flush()
        poll = select.poll()
        poll.register(self._results, select.POLLIN)
        if not poll.poll(_POLL_MS):
            if self._died():
                self._restart()
            return
        try:
            message = self._results.recv(_MESSAGE)
        except ConnectionError:
            message = b""
        if not message:  # all of them are gone
            self._restart()
            return
        number, chunk, failed, faults = json.loads(message)
        self._restarts = 0
        self._jobs[number].chunks.pop(chunk, None)
        self._jobs[number].failed.extend((int(row), str(reason)) for row, reason in failed)
        self._jobs[number].faults.extend(faults)

    # -- processes ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Fresh sockets, fresh workers. One queue for all: the kernel hands each message to whoever is free."""
        self._tasks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._results, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._tasks.setblocking(False)
        config = os.memfd_create("roadwork-loader", os.MFD_CLOEXEC)
        text = {
            "layout": asdict(self.layout),
            "paths": self._paths,
            "slots": self._slots,
            "cache": self._cache.state() if self._cache else None,
        }
        with open(config, "wb", closefd=False) as file:
            file.write(json.dumps(text).encode())
        fds = (theirs.fileno(), answers.fileno(), self._memory_fd, config)
        root = str(Path(roadwork.__file__).parent.parent)
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "roadwork.data.worker", str(os.getpid()), *map(str, fds)]
        for _ in range(self.workers):
            process = subprocess.Popen(
                command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, process_group=0
            )
            self._processes.append(process)
        for end in (theirs, answers):
            end.close()
        os.close(config)

    def _died(self) -> bool:
        return any(process.poll() is not None for process in self._processes)

    def _restart(self) -> None:
        codes = [process.poll() for process in self._processes]
        dead = ", ".join(_describe(code) for code in codes if code is not None)
        names = [name for job in self._jobs.values() if job.chunks for name in job.names]
        _stop(self._processes)
        self._tasks.close()
        self._results.close()
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise RuntimeError(
                f"loader processes died {self._restarts} times in a row ({dead}) on photos among "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; free memory, lower data.prefetch or "
                f"data.workers, or check these photos with `python -m shards.verify`"
            )
        logger.warning("a loader process died (%s); all %d are started again", dead, self.workers)
        self._start()
        self._backlog = deque(message for job in self._jobs.values() for message in job.chunks.values())

    def close(self) -> None:
        """End the workers. Batches that were handed out stay valid."""
        if not self._end.alive:  # closed already, or the interpreter ends and took the workers along
            return
        self._end()
        if self.workers:
            self._tasks.close()
            self._results.close()
        os.close(self._memory_fd)
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:  # it waits in the kernel for a file system, and dies when that answers
            logger.warning("loader process %d does not end; it waits for its file system", process.pid)
    processes.clear()


def _describe(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"


def _pin(memory: npt.NDArray[np.uint8]) -> Any:
    """Page-lock shared memory for asynchronous copies; returns what undoes it, or None where CUDA refuses."""
    address = memory.__array_interface__["data"][0]
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) != 0:
        logger.warning(
            "CUDA could not pin %d bytes of batches; copies to the device will be synchronous", memory.nbytes
        )
        with contextlib.suppress(RuntimeError):  # the refusal would be raised by whatever is launched next: by this
            torch.ones(1, device="cuda")
        return None

    def unpin() -> None:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(address)

    return unpin
