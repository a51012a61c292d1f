"""Files and folders that a reader sees whole: the old one or the new one, whenever the writer dies."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a new folder beside `folder`, then let it take its place in one step (Linux; elsewhere in two).

    Raises:
        OSError: a full or read-only disk; the old folder is then untouched.
    """
    new = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        fill(new)
        for path in new.iterdir():
            sync(path)
        sync(new)
        if not folder.exists():
            new.rename(folder)
        elif not _exchange(new, folder):
            old = folder.with_name(f".old-{folder.name}")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # what was there before, or what could not be finished


def mend_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was killed: the old folder comes back where neither stands in its place."""
    old = folder.with_name(f".old-{folder.name}")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for left in (old, folder.with_name(f".new-{folder.name}")):
        shutil.rmtree(left, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one system call (renameat2); False where kernel or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    status: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return status == 0


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
