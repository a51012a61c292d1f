import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from roadwork.command_line import parse
from roadwork.data.cache import ShardCache
from roadwork.data.index import ShardIndex, open_split
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder
from roadwork.errors import UserError
from tests.data.sheets import build


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return build(tmp_path / "remote")


def url(folder: Path) -> str:
    return f"file://{folder}"


def open_remote(remote: Path, tmp_path: Path, gib: float = 1.0) -> ShardIndex:
    return ShardIndex.open(url(remote), "train", cache_dir=str(tmp_path / "cache"), cache_gib=gib)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_batches(remote: Path, tmp_path: Path, workers: int) -> None:
    local = ShardIndex.open(remote, "train")
    order = EndlessOrder(local.gps_weight, 1)
    options = {"global_batch": 6, "micro_batch": 6, "end_position": 60}
    far = TrainLoader(open_remote(remote, tmp_path), order, workers=workers, **options)
    for a, b in zip(TrainLoader(local, order, workers=0, **options), far, strict=True):
        assert torch.equal(a.views, b.views) and a.ids == b.ids and not b.skipped
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def test_the_cache_keeps_to_its_limit_and_drops_the_oldest(remote: Path, tmp_path: Path) -> None:
    sizes = [shard.bytes for shard in ShardIndex.open(remote, "train").shards]
    limit = sizes[0] + sizes[1]
    index = open_remote(remote, tmp_path, limit / 2**30)
    assert index.cache is not None
    first = index.cache.fetch(0)
    os.utime(first, (1, 1))
    index.cache.fetch(1)
    index.cache.fetch(2)
    kept = list((tmp_path / "cache").glob("*.tar"))
    assert first not in kept and sum(path.stat().st_size for path in kept) <= limit
    assert index.cache.fetch(0) == first and first.exists()


def test_a_shard_that_the_cache_dropped_takes_no_disk_any_more(remote: Path, tmp_path: Path) -> None:
    """A file that is gone but open still fills the disk: a reader lets go of it at its next fetch."""
    sizes = [shard.bytes for shard in ShardIndex.open(remote, "train").shards]
    index = open_remote(remote, tmp_path, (max(sizes) + 1) / 2**30)
    for row in (0, 8, 16, 0, 8):
        assert (index.read_views(row) == ShardIndex.open(remote, "train").read_views(row)).all()
    folder = str(tmp_path / "cache")
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.lexists(link)]
    held = [name for name in opened if name.startswith(folder) and ".tar" in name]
    assert len(held) == 1 and not held[0].endswith("(deleted)")


def test_a_shard_altered_at_its_source_is_refused_and_not_kept(remote: Path, tmp_path: Path) -> None:
    index = open_remote(remote, tmp_path)
    with open(remote / "train-000001.tar", "r+b") as file:
        file.seek(3000)
        file.write(b"!!")
    assert index.cache is not None
    with pytest.raises(UserError, match=r"train-000001.tar is altered or cut .*upload it again"):
        index.cache.fetch(1)
    (remote / "train-000002.tar").unlink()
    with pytest.raises(UserError, match="train-000002.tar is missing"):
        index.cache.fetch(2)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_a_shard_larger_than_the_cache_is_refused(remote: Path, tmp_path: Path) -> None:
    index = open_remote(remote, tmp_path, 1e-9)
    assert index.cache is not None
    with pytest.raises(UserError, match="raise data.cache_gib"):
        index.cache.fetch(0)


def _fetch(cache: ShardCache, gate: object, out: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    path = cache.fetch(0)
    out.put((path.stat().st_ino, path.stat().st_size))  # type: ignore[attr-defined]


def test_processes_that_want_the_same_shard_fetch_it_once(remote: Path, tmp_path: Path) -> None:
    index = open_remote(remote, tmp_path)
    context = multiprocessing.get_context("fork")
    gate, out = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_fetch, args=(index.cache, gate, out)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {out.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert found == {(found.copy().pop()[0], index.shards[0].bytes)}


def _hang(cache: ShardCache, ready: object) -> None:
    import roadwork.data.cache as module

    def slow(*_: object) -> None:
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)

    module.os.fsync = slow  # type: ignore[attr-defined]
    cache.fetch(0)


def test_a_kill_in_the_middle_of_a_fetch_leaves_a_usable_cache(remote: Path, tmp_path: Path) -> None:
    index = open_remote(remote, tmp_path)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hang, args=(index.cache, ready))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert ".tmp" in left and ".tar" not in left
    assert index.cache is not None
    path = index.cache.fetch(0)
    assert path.stat().st_size == index.shards[0].bytes
    assert ".tmp" not in {path.suffix for path in (tmp_path / "cache").iterdir()}


def test_what_a_killed_fetch_left_goes_where_only_a_writable_file_can_be_locked(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: flock(2), EBADF."""
    lock = fcntl.flock

    def as_on_nfs(file: BinaryIO, operation: int) -> None:
        if operation & fcntl.LOCK_EX and not file.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(file, operation)

    monkeypatch.setattr("roadwork.data.cache.fcntl.flock", as_on_nfs)
    left = tmp_path / "cache" / f".{'0' * 64}.tar.1.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    cache = open_remote(remote, tmp_path).cache
    assert cache is not None and cache.fetch(0).exists() and not left.exists()


def test_a_missing_remote_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest.json is missing"):
        ShardIndex.open(url(tmp_path / "nowhere"), "train")
    shutil.rmtree(tmp_path / "nowhere", ignore_errors=True)


def test_every_stage_opens_shards_behind_the_runs_cache(remote: Path, tmp_path: Path) -> None:
    words = [f"--data.shards={url(remote)}", f"--data.cache_dir={tmp_path / 'mine'}", "--data.cache_gib=2"]
    cache = open_split(parse("predict", [f"--run.dir={tmp_path}", *words]).config, "train").cache
    assert cache is not None and cache.folder == tmp_path / "mine" and cache.limit == 2 << 30
