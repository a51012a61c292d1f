"""A bounded local copy of remote shards: checked by SHA-256, shared by a machine's processes, safe against kills."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from roadwork.data.shards import ShardInfo, atomic_file
from roadwork.errors import UserError

_BLOCK = 4 << 20


def is_remote(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a URL for fsspec (`s3://bucket/shards`, `hf://...`, `memory://...`)."""
    return "://" in os.fspath(folder)


@dataclass(frozen=True)
class ShardCache:
    """Shards of `url` under `folder`, named by their SHA-256, at most `limit` bytes in all.

    A shard is fetched under a lock of its own, so that processes never fetch the same one twice at once; it appears by
    rename after its hash was checked, so that a kill leaves at most a temporary file, which the next fetch removes. The
    least recently opened shards are removed first; a process that still reads one keeps it through its descriptor.
    """

    url: str
    folder: Path
    limit: int
    shards: Sequence[ShardInfo]

    def fetch(self, number: int) -> Path:
        """Local path of a shard; UserError where it is missing or altered at its source, or larger than the cache."""
        shard = self.shards[number]
        path = self.folder / f"{shard.sha256}.tar"
        if self._here(path, shard):
            return path
        if shard.bytes > self.limit:
            raise UserError(
                f"shard {shard.name} has {shard.bytes} bytes, the cache {self.folder} may hold {self.limit}; "
                f"raise data.cache_gib"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{shard.sha256}.lock"):
            if not self._here(path, shard):
                self._sweep(path)
                self._make_room(shard.bytes)
                self._download(shard, path)
        return path

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
        digest = hashlib.sha256()
        source = f"{self.url.rstrip('/')}/{shard.name}"
        try:
            with fsspec.open(source, "rb") as remote, atomic_file(path) as file:
                while block := remote.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != shard.sha256:
                    raise UserError(
                        f"shard {source} is altered or cut (its SHA-256 differs from the manifest's); "
                        f"upload it again from where it was built"
                    )
        except FileNotFoundError as error:
            raise UserError(f"shard {source} is missing; upload it again from where it was built") from error

    def _sweep(self, path: Path) -> None:
        """Remove what a killed fetch of this shard left; nobody else fetches it while the lock is held."""
        for left in self.folder.glob(f".{path.name}.*.tmp"):
            left.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        with _locked(self.folder / "evict.lock"):
            found: list[tuple[float, int, Path]] = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
            total = sum(size for _, size, _ in found) + needed
            for _, size, path in sorted(found):
                if total <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= size

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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock that the kernel releases when its holder dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
