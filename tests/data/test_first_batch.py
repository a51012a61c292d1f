"""What stands before the first batch of a resumed run: nothing of what lies before its position is read or computed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roadwork.data import loader as module
from roadwork.data.index import ShardIndex
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder, Windows
from roadwork.data.ranges import RangeReader
from tests.data.sheets import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("first") / "shards")


def train(folder: Path, **options: Any) -> TrainLoader:
    index = ShardIndex.open(folder, "train")
    order = EndlessOrder(index.gps_weight, 5)
    return TrainLoader(index, order, global_batch=12, micro_batch=4, workers=0, load_masks=False, **options)


@pytest.mark.parametrize("step", [0, 1, 50, 10**12])
def test_the_first_batch_costs_its_own_photos_wherever_a_run_resumes(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    asked: list[list[int]] = []
    pread, at = RangeReader.read, EndlessOrder.at

    def counted_read(self: RangeReader, number: int, offset: int, size: int) -> bytes:
        read.append((number, offset))
        return pread(self, number, offset, size)

    def counted_at(self: EndlessOrder, positions: Any) -> Any:
        asked.append(np.asarray(positions).tolist())
        return at(self, positions)

    monkeypatch.setattr(RangeReader, "read", counted_read)
    monkeypatch.setattr(EndlessOrder, "at", counted_at)
    loader = train(folder, start_step=step)
    first = next(iter(loader))
    loader.close()
    assert first.position.tolist() == [12 * step + i for i in range(4)]
    assert asked == [first.position.tolist()]
    rows, index = first.sample.numpy(), loader.index
    assert read == list(zip(index.shard[rows].tolist(), index.views_offset[rows].tolist(), strict=True))


@pytest.mark.parametrize("windows", [None, 512])
def test_no_position_costs_more_memory_than_another(windows: int | None) -> None:
    photos, draws = 200_000, 256
    weights = np.random.default_rng(0).random(photos) + 0.5
    edges = np.arange(0, photos + 1, 100)
    peaks = {}
    for first in (0, photos // 2, photos - draws, 7 * photos, 10**12):
        order = EndlessOrder(weights, 3, windows=None if windows is None else Windows(edges, windows))
        order.at(np.arange(draws))  # what an order holds anyway
        tracemalloc.start()
        order.at(np.arange(first, first + draws))
        peaks[first] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(peaks.values()) < weights.nbytes / 4, peaks


@pytest.mark.parametrize(("available", "initialised"), [(False, False), (True, False), (False, True), (True, True)])
def test_memory_is_page_locked_where_cuda_runs_and_nowhere_else(
    folder: Path, available: bool, initialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Chosen(Exception):
        pass

    def pool(*_: Any, pin: bool, **__: Any) -> None:
        raise Chosen(pin)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(module, "DecodePool", pool)
    with pytest.raises(Chosen) as chosen:
        next(iter(train(folder)))
    assert chosen.value.args == (available and initialised,)
