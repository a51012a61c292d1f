"""A shard that cannot be read stops the run with its name: no budget of unreadable photos pays for it."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader, TrainLoader
from roadwork.data.order import EndlessOrder
from roadwork.errors import UserError
from tests.data.sheets import build


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faults") / "shards")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def remote(folder: Path) -> ShardIndex:
    return ShardIndex.open(f"file://{folder}", "train", cache_dir=str(folder.parent / "cache"), cache_gib=1.0)


def loader(index: ShardIndex, budget: float | None = 0.9, **options: Any) -> TrainLoader:
    chosen = {"global_batch": 1, "micro_batch": 1, "workers": 0, "end_position": 60, **options}
    return TrainLoader(index, EndlessOrder(index.gps_weight, 5), bad_sample_budget=budget, **chosen)


def gone(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("opened", "fault", "words"),
    [
        (lambda folder: ShardIndex.open(folder, "train"), gone, r"No such file .*train-000001.tar.*build it again"),
        (lambda folder: ShardIndex.open(folder, "train"), cut, r"train-000001.tar ends at byte .*build it again"),
        (remote, gone, "train-000001.tar is missing; upload it again"),
        (remote, altered, "train-000001.tar is altered or cut .*upload it again"),
    ],
)
def test_a_shard_that_cannot_be_read_stops_whatever_the_budget(
    folder: Path, opened: Any, fault: Any, words: str, workers: int
) -> None:
    index = opened(folder)
    fault(folder / "train-000001.tar")
    chosen = loader(index, workers=workers)
    with pytest.raises(UserError, match=words):
        list(chosen)
    assert chosen.unreadable == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_where_the_caller_judges_the_fault_is_told_with_the_batch(folder: Path, workers: int) -> None:
    """One rank must not leave alone: the trainer lets all of them know first."""
    index = ShardIndex.open(folder, "train")
    gone(folder / "train-000001.tar")
    batches = list(EvalLoader(index, batch=7, workers=workers, bad_sample_budget=None))
    assert [bool(batch.faults) for batch in batches] == [False, True, True]
    for batch in batches:
        assert batch.weight.all() != bool(batch.faults) and batch.skipped == []
        if batch.faults:
            assert "train-000001.tar" in batch.faults[0] and not batch.weight.any() and not batch.views.any()


def test_a_full_disk_of_the_cache_stops_with_its_name(folder: Path) -> None:
    batches = iter(loader(remote(folder)))
    assert next(batches).weight.all()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # stands for a full disk
    try:
        with pytest.raises(UserError, match=r"the cache .*/cache cannot take shard train-.*make room.*data.cache_dir"):
            list(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = {path.suffix for path in (folder.parent / "cache").iterdir()}
    assert left == {".tar", ".lock"}, "what did not fit is taken away"
