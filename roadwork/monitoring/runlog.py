"""metrics.jsonl: one JSON object per line, on disk as soon as it is written, mended after a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

_TAIL_BLOCK = 1 << 16


def plain(value: Any) -> Any:
    """A value as JSON knows it: tensors and numpy scalars become Python numbers; nan and infinities become None.

    Finite floats keep every digit (Python writes the shortest text that reads back to the same number).
    """
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"cannot write {type(value).__name__} to JSON; give numbers, text, lists or dicts of them")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def repair(path: str | os.PathLike[str]) -> int:
    """Cuts what a kill or a power loss left behind the last complete line; returns the bytes cut (0: nothing wrong).

    A complete line ends in a newline and holds one JSON object. Only the end of the file is read.
    """
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = _line_start(file, end)
            file.seek(start)
            line = file.read(end - start)
            if line.endswith(b"\n") and _parsed(line) is not None:
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
    return size - end


def _line_start(file: BinaryIO, end: int) -> int:
    """Offset of the line whose last byte is at end - 1."""
    stop = end - 1  # a newline at end - 1 belongs to the line itself
    while stop > 0:
        begin = max(0, stop - _TAIL_BLOCK)
        file.seek(begin)
        found = file.read(stop - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        stop = begin
    return 0


class RunLog:
    """Appends records to a .jsonl file. Only one process may hold it (rank 0).

    Every `append` is one write to the file descriptor: a killed process loses at most the line that it was writing, and
    the next `RunLog` on the same path cuts that one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.repaired_bytes = repair(self.path) if self.path.exists() else 0
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line. OSError (a full disk) leaves the file without a torn line and names it."""
        line = (json.dumps(plain(dict(record)), allow_nan=False, ensure_ascii=False) + "\n").encode()
        size = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise OSError(error.errno, f"cannot write a line of metrics: {error.strerror}", str(self.path)) from error

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Records in the order in which they were written; a line that is no JSON object is passed over."""
    with open(path, "rb") as file:
        for line in file:
            record = _parsed(line) if line.endswith(b"\n") else None
            if record is not None:
                yield record


def read_last_per_step(path: str | os.PathLike[str], key: str = "step") -> list[dict[str, Any]]:
    """Records by ascending step, the LAST line of each step: what counts after a relaunch repeated some steps.

    Records without the key are left out. A missing file gives an empty list.
    """
    if not os.path.exists(path):
        return []
    last = {record[key]: record for record in read_lines(path) if isinstance(record.get(key), int)}
    return [last[step] for step in sorted(last)]
