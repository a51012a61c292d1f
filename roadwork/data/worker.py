"""A loader process: reads byte ranges, decodes them into shared memory, knows neither torch nor the index.

Started as `python -m roadwork.data.worker` by `DecodePool`. It lives in a process group of its own with default signal
handlers, so that a terminal's or a launcher's signals reach the training process alone; it ends with its parent.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from roadwork.data.decode import Unreadable, decode_masks, decode_views, unpack_masks
from roadwork.data.ranges import RangeReader
from roadwork.data.slots import TASK, TEXT_DIM, SlotLayout
from roadwork.errors import UserError

Arrays = dict[str, npt.NDArray[Any]]
HEADER = np.dtype([("job", "<i8"), ("chunk", "<i8"), ("slot", "<i8"), ("views", "<i8")])
_PR_SET_PDEATHSIG = 1
_MESSAGE = 1 << 16


def fill_rows(
    tasks: npt.NDArray[Any], reader: RangeReader, layout: SlotLayout, arrays: Arrays
) -> list[tuple[int, str]]:
    """Decode photos into their rows of a slot; (row, reason) of each that could not be, its row left black.

    tasks: TASK records [n]; arrays: those of `SlotLayout.arrays`, [B, ...], written in place.

    Raises:
        UserError, OSError, MemoryError: a shard that cannot be opened, fetched or read is no fault of a photo.
    """
    failed = []
    for task in tasks.tolist():
        try:
            _fill_row(dict(zip(TASK.names or (), task, strict=True)), reader, layout, arrays)
        except Unreadable as error:
            failed.append((task[0], str(error)))
            for array in arrays.values():
                array[task[0]] = 0
    return failed


def read_rows(
    tasks: npt.NDArray[Any], reader: RangeReader, layout: SlotLayout, arrays: Arrays
) -> tuple[list[tuple[int, str]], list[str]]:
    """What `fill_rows` gives, and what kept it from reading a shard, with the remedy: the run then has to stop.

    tasks: TASK records [n]; arrays: as in `fill_rows`.
    """
    try:
        return fill_rows(tasks, reader, layout, arrays), []
    except UserError as error:
        return [], [str(error)]
    except OSError as error:
        remedy = "put it back, or build it again with `python -m shards.build`"
        return [], [f"a shard cannot be read ({error}); {remedy}"]
    except MemoryError:
        return [], ["a loader process has no memory left; lower data.workers or data.prefetch"]


def _fill_row(task: dict[str, int], reader: RangeReader, layout: SlotLayout, arrays: Arrays) -> None:
    row, count = task["row"], task["num_views"]
    views = arrays["views"][row]
    views[count:] = 0
    if count:
        data = reader.read(task["shard"], task["views_offset"], task["views_size"])
        decode_views(data, count, layout.view_size, out=views[:count], crc=task["crc"])
    if layout.masks:
        masks = arrays["masks"][row]
        if count and task["masks_size"]:
            data = reader.read(task["shard"], task["masks_offset"], task["masks_size"])
            unpack_masks(decode_masks(data, count, layout.mask_size), out=masks[:count])
            masks[count:] = 0
        else:
            masks[:] = 0
    if layout.text:
        arrays["text"][row] = np.nan
        if count:
            arrays["text"][row] = _text(reader.read(task["shard"], task["meta_offset"], task["meta_size"]))


def _text(meta: bytes) -> npt.NDArray[np.float32]:
    """Embedding of the description, float32 [384], NaN where there is none. Unreadable for damaged metadata."""
    try:
        text = np.asarray(json.loads(meta).get("text") or np.full(TEXT_DIM, np.nan), dtype=np.float32)
    except (ValueError, TypeError, AttributeError) as error:  # no checksum covers the JSON
        raise Unreadable(f"its metadata do not parse ({error})") from error
    if text.shape != (TEXT_DIM,):
        raise Unreadable(f"its text has shape {text.shape}, not ({TEXT_DIM},)")
    return text


def _detach(parent: int) -> None:
    """Default signals, no blocked ones, and death with the parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(0)


def _cache(state: dict[str, Any] | None) -> Any:
    if state is None:
        return None
    from roadwork.data.cache import ShardCache  # fsspec takes a while to import

    return ShardCache.from_state(state)


def main() -> None:
    """Serve tasks until the training process closes the queue."""
    parent, tasks_fd, results_fd, memory_fd, config_fd = (int(word) for word in sys.argv[1:])
    _detach(parent)
    cv2.setNumThreads(0)
    with open(f"/proc/self/fd/{config_fd}", encoding="utf-8") as file:
        config = json.load(file)
    layout = SlotLayout(**config["layout"])
    reader = RangeReader(config["paths"], cache=_cache(config["cache"]))
    memory = np.frombuffer(mmap.mmap(memory_fd, config["slots"] * layout.slot_bytes), dtype=np.uint8)
    slots = memory.reshape(config["slots"], layout.slot_bytes)
    tasks, results = socket.socket(fileno=tasks_fd), socket.socket(fileno=results_fd)
    while message := tasks.recv(_MESSAGE):
        head = np.frombuffer(message, dtype=HEADER, count=1)[0]
        arrays = layout.arrays(slots[head["slot"]], int(head["views"]))
        rows = np.frombuffer(message, dtype=TASK, offset=HEADER.itemsize)
        failed, faults = read_rows(rows, reader, layout, arrays)
        try:
            results.send(json.dumps([int(head["job"]), int(head["chunk"]), failed, faults]).encode())
        except OSError:
            return


if __name__ == "__main__":
    main()
