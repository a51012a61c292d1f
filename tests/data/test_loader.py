import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roadwork.data.batch import Batch
from roadwork.data.index import ShardIndex, write_index
from roadwork.data.loader import EvalLoader, TrainLoader
from roadwork.data.order import EndlessOrder
from roadwork.data.scan import scan_shard
from roadwork.data.shards import write_shard
from roadwork.errors import UserError
from tests.data.sheets import SIZE, build, sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("loader") / "shards")


def train(folder: Path, **options: Any) -> TrainLoader:
    index = ShardIndex.open(folder, "train")
    chosen = {"global_batch": 12, "micro_batch": 4, "workers": 0, "end_position": 60, **options}
    return TrainLoader(index, EndlessOrder(index.gps_weight, 5), **chosen)


def key(batch: Batch) -> tuple[list[int], list[int], list[float]]:
    return batch.position.tolist(), batch.sample.tolist(), batch.weight.tolist()


def assert_same(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(b, name)), name
    for name, value in a.metadata.items():
        assert torch.equal(value.nan_to_num(-7), b.metadata[name].nan_to_num(-7)), name
    assert a.ids == b.ids and a.skipped == b.skipped


def test_a_batch_is_what_was_written(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    batches = list(train(folder, workers=1))
    assert len(batches) == 15
    for batch in batches:
        assert batch.views.dtype == torch.uint8 and batch.views.shape[2:] == (3, SIZE, SIZE)
        assert batch.views.shape[1] == max(len(sample(i).boxes) for i in batch.sample.tolist())
        for row, i in enumerate(batch.sample.tolist()):
            written = sample(i)
            meta, count = written.meta, len(written.boxes)
            assert batch.view_mask[row].tolist() == [v < count for v in range(batch.views.shape[1])]
            assert torch.equal(batch.views[row, :count], torch.from_numpy(index.read_views(i).copy()))
            assert not batch.views[row, count:].any() and not batch.boxes[row, count:].any()
            np.testing.assert_array_equal(batch.boxes[row, :count], index.boxes(i))
            assert batch.label[row] == (-100 if meta["label"] is None else meta["label"])
            assert batch.weather[row] == (-100 if meta["weather"] is None else meta["weather"])
            assert batch.metadata["weather"][row] == (-1 if meta["weather"] is None else meta["weather"])
            assert batch.metadata["scene"][row] == -1 and batch.metadata["daytime"][row] == meta["daytime"]
            place = [float("nan") if meta[k] is None else meta[k] for k in ("latitude", "longitude")]
            np.testing.assert_array_equal(batch.metadata["gps"][row], np.float32(place))
            assert batch.ids[row] == meta["id"]
            assert batch.masks_valid[row].tolist() == meta.get("masks_valid", [False] * 6)
            assert batch.masks is not None
            masks = index.read_masks(i)
            expected = np.zeros((count, 6, SIZE // 4, SIZE // 4)) if masks is None else masks
            np.testing.assert_array_equal(batch.masks[row, :count], expected)
            assert not batch.masks[row, count:].any()
        assert "text" not in batch.metadata and batch.wait_s >= 0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(folder: Path, workers: int) -> None:
    for a, b in zip(train(folder), train(folder, workers=workers, prefetch=2), strict=True):
        assert_same(a, b)


def test_a_step_is_the_same_for_any_world_and_accumulation(folder: Path) -> None:
    def step_samples(world: int, micro: int) -> list[list[tuple[int, int]]]:
        ranks = [list(train(folder, micro_batch=micro, rank=r, world_size=world)) for r in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        accumulation = 12 // (world * micro)
        steps = []
        for first in range(0, len(ranks[0]), accumulation):
            photos: list[tuple[int, int]] = []
            for m in range(first, first + accumulation):
                for batches in ranks:
                    photos += zip(batches[m].position.tolist(), batches[m].sample.tolist(), strict=True)
            steps.append(photos)
        return steps

    reference = step_samples(1, 12)
    assert [position for step in reference for position, _ in step] == list(range(60))
    for world, micro in ((1, 1), (1, 4), (2, 6), (2, 3), (3, 4), (3, 2), (4, 3), (4, 1)):
        assert step_samples(world, micro) == reference


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_what_would_have_followed(folder: Path, workers: int) -> None:
    whole = list(train(folder))
    for start in (1, 3, 4):
        rest = list(train(folder, start_step=start, workers=workers))
        assert len(rest) == 3 * (5 - start)
        for a, b in zip(whole[3 * start :], rest, strict=True):
            assert_same(a, b)


def test_the_stream_is_endless_and_far_starts_are_quick(folder: Path) -> None:
    loader = train(folder, end_position=None, start_step=10**12)
    batches = iter(loader)
    first = [next(batches) for _ in range(4)]
    assert first[0].position[0] == 12 * 10**12 and first[0].epoch[0] == 12 * 10**12 // 21
    assert all(batch.weight.all() for batch in first)


def test_photos_past_the_end_weigh_nothing(folder: Path) -> None:
    batches = list(train(folder, end_position=41, workers=2))
    assert len(batches) == 12 and all(len(batch) == 4 for batch in batches)
    weights = torch.cat([batch.weight for batch in batches])
    assert weights.tolist() == [1.0] * 41 + [0.0] * 7
    last = batches[-1]
    assert not last.views.any() and (last.label == -100).all() and (last.weather == -100).all()
    assert not last.masks_valid.any() and last.view_mask[:, 0].all() and last.skipped == []


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """Sample 4 altered in the middle of its sheet, sample 12's sheet cut off by zeros."""
    shutil.copytree(folder, tmp_path / "broken")
    index = ShardIndex.open(folder, "train")
    for i, share in ((4, 0.5), (12, 0.0)):
        with open(tmp_path / "broken" / index.shards[index.shard[i]].name, "r+b") as file:
            file.seek(int(index.views_offset[i] + share * index.views_size[i]))
            file.write(bytes(8))
    return tmp_path / "broken"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_photos_are_skipped_and_named(folder: Path, broken: Path, workers: int) -> None:
    loader = train(broken, workers=workers, bad_sample_budget=0.5)
    skipped = set()
    for good, batch in zip(train(folder), loader, strict=True):
        assert good.sample.tolist() == batch.sample.tolist()
        for row, i in enumerate(batch.sample.tolist()):
            if i in (4, 12):
                assert batch.weight[row] == 0 and batch.label[row] == -100 and not batch.masks_valid[row].any()
                assert not batch.views[row].any() and batch.view_mask[row].any()
            else:
                assert batch.weight[row] == 1
                count = int(batch.view_mask[row].sum())
                assert torch.equal(batch.views[row, :count], good.views[row, :count])
        skipped.update(name for name, _ in batch.skipped)
        assert all("CRC-32" in reason for _, reason in batch.skipped)
    assert skipped == {"photo.4", "photo.12"} == set(loader.unreadable)


def test_too_many_unreadable_photos_stop_with_their_names(broken: Path) -> None:
    with pytest.raises(UserError, match=r"2 photos of .* cannot be read.*photo\.(4|12): the JPEG") as caught:
        list(train(broken, bad_sample_budget=0.001))
    assert "photo.4" in str(caught.value) and "photo.12" in str(caught.value) and "shards.verify" in str(caught.value)


def test_one_unreadable_photo_never_stops_a_run_unless_the_budget_is_zero(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "one")
    index = ShardIndex.open(folder, "train")
    with open(tmp_path / "one" / index.shards[index.shard[4]].name, "r+b") as file:
        file.seek(int(index.views_offset[4]) + 100)
        file.write(bytes(8))
    loader = train(tmp_path / "one", end_position=600)
    assert sum(len(batch.skipped) for batch in loader) > 5 and set(loader.unreadable) == {"photo.4"}
    with pytest.raises(UserError, match="1 photos of"):
        list(train(tmp_path / "one", bad_sample_budget=0.0))


def test_a_shard_that_vanishes_during_a_run_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "gone")
    loader = train(tmp_path / "gone", workers=1)
    (tmp_path / "gone" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match="train-000001.tar"):
        list(loader)


def test_held_batches_are_never_overwritten(folder: Path) -> None:
    kept = list(train(folder, workers=2, prefetch=1))
    for batch, fresh in zip(kept, train(folder), strict=True):
        assert_same(batch, fresh)


def test_a_tensor_outlives_its_batch_and_its_loader(folder: Path) -> None:
    loader = train(folder, workers=2)
    batches = iter(loader)
    views = next(batches).views[1]
    expected = views.clone()
    for _ in range(8):
        next(batches)
    assert torch.equal(views, expected)
    loader.close()
    assert torch.equal(views, expected)
    assert next(batches, None) is None


def test_evaluation_reads_each_sample_once_over_all_ranks(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    for world in (1, 2, 3, 4):
        seen: list[int] = []
        for rank in range(world):
            loader = EvalLoader(index, batch=4, rank=rank, world_size=world, workers=rank % 2)
            batches = list(loader)
            mine = torch.cat([batch.sample for batch in batches]).tolist()
            assert mine == list(range(21))[rank::world] and len(batches) == len(loader)
            assert len(batches[-1]) == (len(mine) - 1) % 4 + 1 and batches[-1].views.shape[0] == len(batches[-1])
            assert all(batch.weight.all() and torch.equal(batch.position, batch.sample) for batch in batches)
            seen += mine
        assert sorted(seen) == list(range(21))


def test_evaluation_of_chosen_samples_keeps_their_order(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    loader = EvalLoader(index, batch=3, workers=1, indices=[9, 2, 2, 17])
    for _ in range(2):  # it can be read again
        assert [batch.sample.tolist() for batch in loader] == [[9, 2, 2], [17]]
    assert list(EvalLoader(index, batch=3, indices=[])) == []
    with pytest.raises(IndexError, match="leave the index of 21"):
        EvalLoader(index, batch=3, indices=[21])


def test_text_comes_only_when_asked_for(tmp_path: Path) -> None:
    text = [float(i) for i in range(384)]
    path = tmp_path / "val-000000.tar"
    write_shard(path, [sample(0, text=text), sample(1)])
    write_index(tmp_path, [scan_shard(path)])
    index = ShardIndex.open(tmp_path, "val")
    for workers in (0, 1):
        batch = next(iter(EvalLoader(index, batch=4, workers=workers, load_text=True)))
        assert batch.metadata["text"][0].tolist() == text and batch.metadata["text"][1].isnan().all()
        assert "text" not in next(iter(EvalLoader(index, batch=4, workers=workers))).metadata


def test_moving_a_batch_keeps_everything(folder: Path) -> None:
    batch = next(iter(train(folder, workers=1)))
    assert_same(batch, batch.to("cpu", non_blocking=True))
    meta = batch.to("meta")
    assert meta.views.shape == batch.views.shape and meta.metadata["gps"].is_meta and meta.masks.is_meta
    assert meta.ids == batch.ids


def test_masks_can_be_left_out(folder: Path) -> None:
    assert next(iter(train(folder, load_masks=False))).masks is None


def test_a_global_batch_that_does_not_divide_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="global_batch 12 is not a multiple of 5 processes x micro_batch 4"):
        train(folder, world_size=5)


def processes(loader: TrainLoader) -> list[int]:
    return [process.pid for process in loader._pools[0]._processes]


def default_signals(pid: int) -> bool:
    """Whether SIGTERM and SIGUSR2 are neither blocked, ignored nor caught."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [int(status.split(f"{line}:")[1].split()[0], 16) for line in ("SigBlk", "SigIgn", "SigCgt")]
    return not any(mask >> (number - 1) & 1 for mask in masks for number in (signal.SIGTERM, signal.SIGUSR2))


def test_workers_stand_apart_and_end_with_the_loader(folder: Path) -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        loader = train(folder, workers=2, end_position=None)
        batches = iter(loader)
        next(batches)
        pids = processes(loader)
        assert len(pids) == 2
        for pid in pids:
            assert os.getpgid(pid) == pid != os.getpgrp()
            deadline = time.monotonic() + 20  # a worker that is still starting has the handlers that it inherited
            while not default_signals(pid):
                assert time.monotonic() < deadline, Path(f"/proc/{pid}/status").read_text()
                time.sleep(0.05)
        loader.close()
        for pid in pids:
            assert not Path(f"/proc/{pid}").exists()
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_workers_are_replaced_and_nothing_is_lost(
    folder: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    loader = train(folder, workers=2, prefetch=1, end_position=None)
    reference = iter(train(folder, end_position=None))
    for turn, batch in enumerate(loader):
        assert_same(batch, next(reference))
        if turn in (2, 10):
            os.kill(processes(loader)[0], number)
        if turn == 12:
            for pid in processes(loader):
                os.kill(pid, number)
        if turn == 30:
            break
    loader.close()
    named = [record.getMessage().count(number.name) for record in caplog.records]  # one line may name both
    assert sum(named) >= 2


def test_workers_die_with_a_killed_trainer(folder: Path) -> None:
    code = f"""
import sys, time
from roadwork.data.index import ShardIndex
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder
index = ShardIndex.open({str(folder)!r}, "train")
loader = TrainLoader(index, EndlessOrder(index.gps_weight, 0), global_batch=4, micro_batch=4, workers=2)
batches = iter(loader)
next(batches)
print(*[process.pid for process in loader._pools[0]._processes], flush=True)
time.sleep(100)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    pids = [int(word) for word in trainer.stdout.readline().split()]
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their trainer"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_script_that_leaves_an_iteration_unfinished_ends_quietly(folder: Path, workers: int) -> None:
    code = f"""
from roadwork.data.index import ShardIndex
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder
index = ShardIndex.open({str(folder)!r}, "train")
loader = TrainLoader(index, EndlessOrder(index.gps_weight, 5), global_batch=4, micro_batch=4, workers={workers})
batches = iter(loader)
print(len(next(batches).ids))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def memory(pid: int, name: str) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{name}:")[1].split()[0])


def test_memory_stays_flat(folder: Path) -> None:
    loader = train(folder, workers=2, end_position=None)
    batches = iter(loader)
    for _ in range(200):
        next(batches)
    pids = [*processes(loader), os.getpid()]
    seen = [[memory(pid, "RssAnon") for pid in pids]]
    for _ in range(3):
        for _ in range(500):
            next(batches)
        seen.append([memory(pid, "RssAnon") for pid in pids])
    # A leak grows in each third; what malloc keeps now and then on a busy machine does not.
    grown = [min(after - before for before, after in itertools.pairwise(of)) for of in zip(*seen, strict=True)]
    assert max(grown) < 4 * 1024 // 3, f"KiB grown in every 500 batches by worker 0, worker 1, trainer: {grown}"
    assert all(memory(pid, "VmRSS") < 300 * 1024 for pid in pids[:2])
    loader.close()
