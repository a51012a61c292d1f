"""Byte ranges of many files through a bounded number of open descriptors."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roadwork.data.cache import ShardCache


class RangeReader:
    """`read(file number, offset, size)` by `os.pread`: no seek state, the least recently used descriptors are closed.

    With a cache, the paths only name the files; the cache fetches each when it is first read. Files are opened anew
    after a fork, so that a child never shares the life of its parent's descriptors.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], max_open: int = 256, cache: ShardCache | None = None
    ) -> None:
        self.cache = cache
        self._paths = [os.fspath(path) for path in paths]
        self._max_open = max_open
        self._open: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset`. OSError where the file cannot be read or ends before them."""
        descriptor = self._descriptor(number)
        try:
            data = os.pread(descriptor, size, offset)
            while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:  # says nothing of the file
            raise OSError(error.errno, error.strerror, self._paths[number]) from error
        if len(data) < size:
            raise OSError(f"{self._paths[number]} ends at byte {offset + len(data)}, before byte {offset + size}")
        return data

    def _descriptor(self, number: int) -> int:
        if self._pid != os.getpid():
            self._open.clear()
            self._pid = os.getpid()
        descriptor = self._open.get(number)
        if descriptor is None:
            while len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            if self.cache is not None:
                descriptor = self.cache.open(number)
                self._let_go()
            else:
                descriptor = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            self._open[number] = descriptor
        else:
            self._open.move_to_end(number)
        return descriptor

    def _let_go(self) -> None:
        """Close files that the cache has removed: an open one keeps its bytes on the disk, beyond the cache's limit."""
        for number, descriptor in list(self._open.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._open.pop(number))

    def close(self) -> None:
        if self._pid == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open.clear()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> tuple[list[str], int, ShardCache | None]:
        return self._paths, self._max_open, self.cache

    def __setstate__(self, state: tuple[list[str], int, ShardCache | None]) -> None:
        RangeReader.__init__(self, *state)
