"""A bounded local copy of remote shards: checked by SHA-256, shared by a machine's processes, safe against kills."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from roadwork.data.shards import ShardInfo
from roadwork.errors import UserError

RETRY_PAUSES_S = (1.0, 4.0, 16.0)
"""Seconds between the tries of a fetch that the network, or the far side, broke off."""
_ROOM_POLL_S = 0.05
_BLOCK = 4 << 20


class _Unreachable(Exception):
    """Whatever a backend raises for a network that fails; many are no OSError."""


def is_remote(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a URL for fsspec (`s3://bucket/shards`, `hf://...`, `memory://...`)."""
    return "://" in os.fspath(folder)


@dataclass(frozen=True)
class ShardCache:
    """Shards of `url` under `folder`, named by their SHA-256, at most `limit` bytes in all.

    A shard is fetched under a lock of its own, so that processes never fetch the same one twice at once. It is written to
    a temporary file that has the shard's full size from the start: what lies in the folder is what is promised, whoever
    counts. Its writer holds a lock on that file, which a kill releases; the next fetch of any shard then removes it. The
    shard appears by rename after its hash was checked. The least recently opened shards are removed first; a process
    that still reads one keeps it through its descriptor.
    """

    url: str
    folder: Path
    limit: int
    shards: Sequence[ShardInfo]

    def fetch(self, number: int) -> Path:
        """Local path of a shard.

        Raises:
            UserError: the shard is missing, altered or out of reach at its source, or larger than the cache; the cache's
                disk is full or cannot be written.
        """
        shard = self.shards[number]
        path = self.folder / f"{shard.sha256}.tar"
        if self._here(path, shard):
            return path
        if shard.bytes > self.limit:
            raise UserError(
                f"shard {shard.name} has {shard.bytes} bytes, the cache {self.folder} may hold {self.limit}; "
                f"raise data.cache_gib"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{shard.sha256}.lock"):
                if not self._here(path, shard):
                    self._download(shard, path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            what = "make room on its disk" if full else "make it writable"
            raise UserError(
                f"the cache {self.folder} cannot take shard {shard.name} ({error.strerror or error}); {what}, or give "
                f"another folder with data.cache_dir"
            ) from error
        return path

    def open(self, number: int) -> int:
        """A descriptor of a shard, fetched where it is not here. Errors as `fetch`."""
        while True:
            path = self.fetch(number)
            with contextlib.suppress(FileNotFoundError):  # another process needed its room in this instant
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @staticmethod
    def _here(path: Path, shard: ShardInfo) -> bool:
        try:
            if path.stat().st_size != shard.bytes:
                return False
            os.utime(path)
        except OSError:
            return False
        return True

    def _download(self, shard: ShardInfo, path: Path) -> None:
        """Fetch a shard to `path`; faults of the network are met with patience."""
        source = f"{self.url.rstrip('/')}/{shard.name}"
        for pause in (*RETRY_PAUSES_S, None):
            try:
                with self._reserved(shard, path) as file:
                    _copy(source, shard, file)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                return
            except _Unreachable as error:
                if pause is None:
                    raise UserError(
                        f"shard {source} cannot be fetched, {len(RETRY_PAUSES_S) + 1} times tried ({error}); see to the "
                        f"network and the access rights"
                    ) from error
                time.sleep(pause)

    @contextlib.contextmanager
    def _reserved(self, shard: ShardInfo, path: Path) -> Iterator[BinaryIO]:
        """A locked temporary file of the shard's size, once there is room for it; gone at the end unless renamed."""
        temporary = self.folder / f".{path.name}.{os.getpid()}.tmp"
        while not (file := self._reserve(temporary, shard.bytes)):
            time.sleep(_ROOM_POLL_S)  # what fills the cache is being fetched: it can be removed when it is whole
        try:
            with file:
                yield file
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> BinaryIO | None:
        """The temporary file, locked and `size` bytes long; None where there is no room now."""
        with _locked(self.folder / "evict.lock"), contextlib.ExitStack() as undo:
            self._sweep()
            if not self._make_room(size):
                return None
            file = undo.enter_context(temporary.open("wb"))
            undo.callback(temporary.unlink)
            fcntl.flock(file, fcntl.LOCK_EX)
            os.ftruncate(file.fileno(), size)
            undo.pop_all()
            return file

    def _sweep(self) -> None:
        """Remove what killed fetches left: a temporary file whose lock nobody holds. Under evict.lock."""
        for left in self.folder.glob(".*.tar.*.tmp"):
            with contextlib.suppress(OSError), left.open("r+b") as file:  # NFS locks what may be written
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> bool:
        """Remove the oldest shards; whether `needed` bytes then fit beside those that are being fetched. Under
        evict.lock."""
        found: list[tuple[float, int, Path]] = []
        total = needed
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                total += status.st_size if path.suffix in (".tar", ".tmp") else 0
                if path.suffix == ".tar":
                    found.append((status.st_mtime, status.st_size, path))
        for _, size, path in sorted(found):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total <= self.limit

    def state(self) -> dict[str, Any]:
        """What a loader process needs to make the same cache, as JSON."""
        return {
            "url": self.url,
            "folder": str(self.folder),
            "limit": self.limit,
            "shards": [vars(shard) for shard in self.shards],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ShardCache:
        """The inverse of `state`."""
        shards = [ShardInfo(**line) for line in state["shards"]]
        return cls(state["url"], Path(state["folder"]), state["limit"], shards)


def _copy(source: str, shard: ShardInfo, file: BinaryIO) -> None:
    """Write the bytes of a remote shard. UserError where they are not the manifest's."""
    digest = hashlib.sha256()
    for block in _blocks(source, shard.bytes):
        digest.update(block)
        file.write(block)
    if digest.hexdigest() != shard.sha256:
        raise UserError(
            f"shard {source} is altered or cut (its SHA-256 differs from the manifest's); "
            f"upload it again from where it was built"
        )


def _blocks(source: str, most: int) -> Iterator[bytes]:
    """The bytes of a remote file, at most one more than `most`. UserError where it is missing."""
    left = most + 1
    try:
        with fsspec.open(source, "rb") as remote:
            while block := remote.read(min(_BLOCK, left)):
                left -= len(block)
                yield block
    except FileNotFoundError as error:
        raise UserError(f"shard {source} is missing; upload it again from where it was built") from error
    except Exception as error:
        raise _Unreachable(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock that the kernel releases when its holder dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
