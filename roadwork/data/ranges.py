"""Byte ranges of many files through a bounded number of open descriptors."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence


class RangeReader:
    """`read(file number, offset, size)` by `os.pread`: no seek state, the least recently used descriptors are closed.

    A file is opened anew after a fork, so that a child never shares the parent's descriptors' life.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], max_open: int = 256) -> None:
        self._paths = [os.fspath(path) for path in paths]
        self._max_open = max_open
        self._open: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset`. OSError where the file cannot be read or ends before them."""
        descriptor = self._descriptor(number)
        data = os.pread(descriptor, size, offset)
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self._paths[number]} ends at byte {offset + len(data)}, before byte {offset + size}")
            data += more
        return data

    def _descriptor(self, number: int) -> int:
        if self._pid != os.getpid():
            self._open.clear()
            self._pid = os.getpid()
        descriptor = self._open.get(number)
        if descriptor is None:
            while len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            self._open[number] = descriptor
        else:
            self._open.move_to_end(number)
        return descriptor

    def close(self) -> None:
        if self._pid == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open.clear()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> tuple[list[str], int]:
        return self._paths, self._max_open

    def __setstate__(self, state: tuple[list[str], int]) -> None:
        self.__init__(*state)  # type: ignore[misc]
