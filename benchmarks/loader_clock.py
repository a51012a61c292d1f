"""The clock of `benchmarks.loader`: photos per second and processor time per photo, the same for every contender."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

WARM = 48
"""Batches before the clock starts: every process has touched nearly every page of the shared memory by then."""


def _cpu_seconds() -> float:
    """User and system time of this process and its living children."""
    ticks, me = os.sysconf("SC_CLK_TCK"), os.getpid()
    total = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(entry) == me or int(fields[1]) == me:
                total += int(fields[11]) + int(fields[12])
    return total / ticks


def measure(make: Callable[[], Iterable[Any]], batches: int, batch: int) -> tuple[float, float]:
    """(photos per second, processor milliseconds per photo) between batch WARM and the last one."""
    source = iter(make())
    for _ in range(WARM):
        views = next(source)
    started, used = time.perf_counter(), _cpu_seconds()
    for _ in range(batches):
        views = next(source)
        assert str(views.dtype) == "torch.uint8" and views.shape[0] == batch and views.shape[2] == 3
    seconds, used = time.perf_counter() - started, _cpu_seconds() - used
    del source
    photos = batches * batch
    return photos / seconds, used / photos * 1e3
