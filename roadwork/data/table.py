"""The cumulative table of a data set's weights, made once and memory-mapped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from roadwork.data.index import ShardIndex
from roadwork.data.order import EndlessOrder, Windows, cumulative_table
from roadwork.data.shards import atomic_file

Floats = npt.NDArray[np.float64]

MAP_FROM = 1_000_000
"""Samples from which the table is kept in a file."""
SUMS = 2
"""Number of the way in which weights are summed: a table of another way has another name."""
KEPT_DAYS = 90
"""Longer than a run goes on without a relaunch, which opens its table anew."""


def mapped_table(folder: str | os.PathLike[str], name: str, key: str, weights: Floats) -> Floats:
    """`cumulative_table(weights)`, float64 [n], as a read-only memory map of `DIR/{name}.cumulative-{key}.npy`.

    `key` stands for the weights' content (an index file's hash): the weights are read only where the file is missing.

    The first caller writes the file, under a lock: a second one would replace it under those who have mapped it. Later
    ones only map it, so that all processes of a machine share its pages. Where the folder cannot be written, a temporary
    file takes its place, and where there is no room for that either, memory.
    """
    path = Path(folder) / f"{name}.cumulative-{key}.npy"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_name(f"{name}.cumulative.lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    with atomic_file(path) as file:
                        np.save(file, cumulative_table(weights))
                    _remove_old(path.parent)
        except OSError:
            return _unshared(cumulative_table(weights))
    with contextlib.suppress(OSError):  # a folder that can only be read: nobody removes anything there
        os.utime(path)
    return _mapped(path)


def _unshared(table: Floats) -> Floats:
    """The table in a file without a name, or as it is."""
    try:
        with tempfile.TemporaryFile() as file:
            np.save(file, table)
            file.flush()
            return _mapped(f"/proc/self/fd/{file.fileno()}")
    except OSError:
        return table


def _remove_old(folder: Path) -> None:
    """Remove tables that nobody has opened for KEPT_DAYS.

    Never a younger one, though its weights are gone from here: a run may have mapped it on another machine, and what is
    removed on a network file system kills whoever reads it next with SIGBUS.
    """
    for old in folder.glob("*.cumulative-*.npy"):
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            if time.time() - old.stat().st_mtime > KEPT_DAYS * 86400:
                old.unlink()


def _mapped(path: str | Path) -> Floats:
    table: Floats = np.load(path, mmap_mode="r")
    return table


def open_order(index: ShardIndex, seed: int, *, weighted: bool = True, window: int = 0) -> EndlessOrder:
    """The training stream of a split by its GPS weights, or each photo once per epoch.

    window: positions of a window that reads few shards (`Windows`); 0: any position may read any shard.

    From MAP_FROM samples on the table is memory-mapped beside the index (beside the cache for remote shards), so that
    ranks share it and a relaunch does not build it again.
    """
    windows = Windows(np.searchsorted(index.shard, np.arange(len(index.shards) + 1)), window) if window else None
    if not weighted:
        return EndlessOrder(np.ones(len(index)), seed, windows=windows)
    if len(index) < MAP_FROM:
        return EndlessOrder(index.gps_weight, seed, windows=windows)
    folder = index.cache.folder if index.cache else index.folder
    key = f"{index.manifest['indexes'][index.split]['sha256'][:16]}-{SUMS}"
    table = mapped_table(folder, index.split, key, index.gps_weight)
    return EndlessOrder(None, seed, cumulative=table, windows=windows)


def stream_digest(index: ShardIndex, *, weighted: bool = True) -> str:
    """SHA-256 of the photos' names, their shards and, where they count, their weights: all that an order draws from.

    Masks and other columns may change in the middle of a run; these may not.
    """
    digest = hashlib.sha256()
    for column in (index.id_bytes, index.shard, *((index.gps_weight,) if weighted else ())):
        digest.update(f"{column.dtype.str} {column.shape} ".encode())
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()
