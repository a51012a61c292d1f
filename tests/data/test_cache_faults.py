"""The cache under concurrent fetches, kills and networks that fail: within its limit, and patient."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from roadwork.data import cache as module
from roadwork.data.cache import ShardCache
from roadwork.data.index import ShardIndex
from roadwork.errors import UserError
from tests.data.sheets import build


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("far") / "remote", {"train": 32})


def opened(far: Path, tmp_path: Path, shards: float = 9.0, kind: str = "file") -> ShardCache:
    """A cache that holds so many of the largest shard."""
    largest = max(shard.bytes for shard in ShardIndex.open(far, "train").shards)
    cache = ShardIndex.open(
        f"{kind}://{far}", "train", cache_dir=str(tmp_path / "cache"), cache_gib=shards * largest / 2**30
    ).cache
    assert cache is not None
    return cache


def held(folder: Path) -> int:
    """Bytes of all files of a folder by their sizes."""
    total = 0
    for name in os.listdir(folder):
        try:
            total += (folder / name).stat().st_size
        except FileNotFoundError:
            continue
    return total


def _fetch_again_and_again(cache: ShardCache, first: int, gate: Any, out: Any) -> None:
    import roadwork.data.cache as module

    rename = os.replace

    def watched(*names: Any) -> None:
        out.put(held(cache.folder))
        rename(*names)
        out.put(held(cache.folder))

    module.os.replace = watched  # type: ignore[attr-defined]
    gate.wait()
    for turn in range(8):
        descriptor = cache.open((first + turn) % len(cache.shards))
        assert os.fstat(descriptor).st_size == cache.shards[(first + turn) % len(cache.shards)].bytes
        os.close(descriptor)
    out.put(None)


def test_processes_that_fetch_different_shards_keep_to_the_limit_together(far: Path, tmp_path: Path) -> None:
    """Four processes want four shards at once; two fit. What is being fetched counts."""
    cache = opened(far, tmp_path, 2.0)
    assert len(cache.shards) == 4
    cache.folder.mkdir()
    context = multiprocessing.get_context("fork")
    gate, out = context.Barrier(5), context.Queue()
    workers = [context.Process(target=_fetch_again_and_again, args=(cache, i, gate, out)) for i in range(4)]
    for worker in workers:
        worker.start()
    gate.wait()
    sizes: list[int] = []
    done = 0
    while done < 4:
        size = out.get(timeout=60)
        done += size is None
        sizes += [held(cache.folder), *([] if size is None else [size])]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(sizes) > 16 and max(sizes) <= cache.limit
    assert {path.suffix for path in cache.folder.iterdir()} == {".tar", ".lock"}


def test_what_a_killed_fetch_of_another_shard_left_goes_away_and_a_living_one_stays(far: Path, tmp_path: Path) -> None:
    cache = opened(far, tmp_path)
    cache.fetch(0)
    orphan = cache.folder / f".{cache.shards[3].sha256}.tar.4242.tmp"
    orphan.write_bytes(bytes(1000))
    with cache._reserved(cache.shards[2], cache.folder / f"{cache.shards[2].sha256}.tar") as file:
        living = Path(file.name)
        assert living.stat().st_size == cache.shards[2].bytes
        cache.fetch(1)
        assert not orphan.exists() and living.exists()
    assert not living.exists()


class Backend(Exception):
    """What a backend raises that is no OSError."""


class Unreliable(LocalFileSystem):
    """Files whose reading breaks off as often as `faults` says."""

    protocol = "unreliable"
    cachable = False
    faults = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("unreliable://"))

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        file = super()._open(path, mode, **more)
        if path.endswith(".tar") and Unreliable.faults:
            Unreliable.faults -= 1

            def broken(*_: int) -> bytes:
                raise Backend("the far side hung up")

            file.read = broken
        return file


@pytest.fixture
def unreliable(far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.0, 0.0))
    return opened(far, tmp_path, kind="unreliable")


def test_a_network_that_fails_twice_costs_nothing(unreliable: ShardCache) -> None:
    Unreliable.faults = 2
    assert unreliable.fetch(0).stat().st_size == unreliable.shards[0].bytes
    assert Unreliable.faults == 0


def test_a_network_that_goes_on_failing_is_told_with_the_shard(unreliable: ShardCache) -> None:
    Unreliable.faults = 100
    with pytest.raises(UserError, match=r"train-000000.tar cannot be fetched, 3 times tried .*the far side hung up"):
        unreliable.fetch(0)
    Unreliable.faults = 0
    assert {path.suffix for path in unreliable.folder.iterdir()} == {".lock"}


def test_a_shard_that_another_process_removed_in_this_instant_is_fetched_again(
    far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetch, removals = opened(far, tmp_path), ShardCache.fetch, [1, 2]

    def fetch_and_lose(self: ShardCache, number: int) -> Path:
        path = fetch(self, number)
        if removals:
            removals.pop()
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    descriptor = cache.open(0)
    assert os.fstat(descriptor).st_size == cache.shards[0].bytes and not removals
    os.close(descriptor)


def test_a_cache_that_cannot_be_written_is_told_with_its_option(far: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"the cache .* cannot take shard train-000000.tar .*data.cache_dir"):
        opened(far, tmp_path).fetch(0)
