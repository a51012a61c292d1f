"""Where shards are built to: whole files by name, in a local folder or behind a URL that fsspec knows."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import fsspec

from roadwork.data.cache import is_remote
from roadwork.data.shards import atomic_file
from roadwork.errors import UserError


class Store(Protocol):
    """Files by name; a name may hold one folder (`.build/x.json`)."""

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError where it is not there."""

    def open(self, name: str) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
        """A file to read and to seek in, without a copy on the local disk; FileNotFoundError where it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; a reader sees the old one or the new one, as far as the store can promise that."""

    def staged(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write; what lies there at the end of the block becomes the file `name`."""

    def fetched(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path of a whole file, for the block alone; FileNotFoundError where it is not there."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where it is not there."""

    def names(self, folder: str = "") -> list[str]:
        """Files of the root, or of a folder in it, without those in deeper folders; none where it is not there."""

    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""


class LocalStore:
    """A folder on a disk; every file appears by rename."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def open(self, name: str) -> io.BufferedReader:
        return (self.folder / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        with atomic_file(self.folder / name) as file:
            file.write(data)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        yield self.folder / name  # `write_shard` is atomic by itself

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        yield self.folder / name

    def size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def names(self, folder: str = "") -> list[str]:
        root = self.folder / folder
        return sorted(path.name for path in root.iterdir() if path.is_file()) if root.is_dir() else []

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class RemoteStore:
    """A URL for fsspec. Object stores show a file only when its upload is complete; nothing more is asked of them."""

    def __init__(self, url: str) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{url}: {error}; give a folder, or a URL whose fsspec package is installed") from error
        self._root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes:
        try:
            data: bytes = self._files.cat_file(self._path(name))
        except OSError:
            raise
        except Exception as error:  # backends raise what they like, for example where credentials are missing
            raise OSError(f"{type(error).__name__}: {error}") from error
        return data

    def open(self, name: str) -> io.BytesIO:
        return io.BytesIO(self.read(name))

    def write(self, name: str, data: bytes) -> None:
        self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(self._path(name), data)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="roadwork-") as folder:
            path = Path(folder) / name
            yield path
            self._files.makedirs(self._root, exist_ok=True)
            self._files.put_file(os.fspath(path), self._path(name))

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="roadwork-") as folder:
            path = Path(folder) / name
            self._files.get_file(self._path(name), os.fspath(path))
            yield path

    def size(self, name: str) -> int | None:
        self._files.invalidate_cache()
        try:
            return int(self._files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        self._files.invalidate_cache()
        root = self._path(folder).rstrip("/")
        try:
            found = self._files.ls(root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(str(line["name"]).rpartition("/")[2] for line in found if line["type"] == "file")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))


def open_store(folder: str | os.PathLike[str]) -> Store:
    """The store of a folder or URL. UserError for a URL of an unknown kind."""
    return RemoteStore(os.fspath(folder)) if is_remote(folder) else LocalStore(folder)
