"""Photos per second that arrive in the training process: ours, the limit of bare decoding, and what others reach.

`python -m benchmarks.loader [--json] [--shards DIR] [--workers 2] [--rounds 5] [--peers-venv DIR]`

All contenders read the same shards with the same workers and give uint8 [B, V, 3, S, S]; all but `webdataset_pil` use
the same decoder. `litdata` and `streaming` run in the environment of `--peers-venv`, on the same bytes in their own
format; without one they are null, and `why_null` says why. Runs alternate; the figures are medians over rounds.
`decode_limit` is a bare loop over the same bytes in as many processes, right before and right after ours.
`*_cpu_ms` is processor time per photo over all processes, which a busy machine disturbs less than the rate.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.loader_clock import measure
from benchmarks.loader_peers import PEERS, ask, views_of
from roadwork.data.decode import decode_views
from roadwork.data.index import ShardIndex, write_index
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder
from roadwork.data.scan import scan_shard
from roadwork.data.shards import Sample, shard_name, write_shard
from roadwork.data.views import make_views, view_boxes

BATCH = 8


def build_shards(folder: Path, photos: int, view_size: int) -> None:
    """Shards of made-up 1280x720 photos with about as many bytes per pixel as street photos have."""
    rng = np.random.default_rng(0)
    scanned = []
    for number, first in enumerate(range(0, photos, 32)):

        def samples(first: int = first) -> Iterator[Sample]:
            for i in range(first, min(first + 32, photos)):
                photo = np.zeros((720, 1280, 3), dtype=np.float32)
                for octave in range(2, 9):
                    shape = (max(720 >> (9 - octave), 2), max(1280 >> (9 - octave), 2), 3)
                    layer = rng.standard_normal(shape).astype(np.float32)
                    photo += cv2.resize(layer, (1280, 720), interpolation=cv2.INTER_CUBIC) * 40 / octave
                rgb = np.clip(photo + 128, 0, 255).astype(np.uint8)
                boxes = view_boxes(1280, 720, view_size)
                meta = dict.fromkeys(("latitude", "longitude", "weather", "daytime", "scene"))
                meta.update(label=i % 2, gps_weight=1.0, group=str(i), width=1280, height=720)
                yield Sample(f"{i:08d}", make_views(rgb, boxes, view_size), boxes, meta)

        write_shard(folder / shard_name("train", number), samples())
        scanned.append(scan_shard(folder / shard_name("train", number)))
    write_index(folder, scanned)


def _to_views(sheet: bytes, size: int) -> torch.Tensor:
    """uint8 [V, S, S, 3] of a sheet whose number of views is in its header."""
    return torch.from_numpy(decode_views(sheet, views_of(sheet, size), size))


def _pil_views(sample: dict[str, Any]) -> torch.Tensor:
    """What a user of webdataset writes: PIL through `decode("pil")`, cut, stacked, channels first."""
    sheet = np.asarray(sample["views.jpg"])
    size = sheet.shape[1]
    return torch.from_numpy(sheet.reshape(-1, size, size, 3).transpose(0, 3, 1, 2).copy())


class PlainDataset(Dataset[torch.Tensor]):
    """A map-style torch data set over the same byte ranges."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.index.read_views(i).transpose(0, 2, 3, 1))


def ours(index: ShardIndex, workers: int) -> Iterator[torch.Tensor]:
    """Views of our loader's batches, uint8 [B, V, 3, S, S]."""
    order = EndlessOrder(index.gps_weight, 0)
    loader = TrainLoader(
        index, order, global_batch=BATCH, micro_batch=BATCH, workers=workers, prefetch=4, load_masks=False
    )
    for batch in loader:
        yield batch.views


def torch_dataset(index: ShardIndex, workers: int) -> Iterator[torch.Tensor]:
    """The same by torch's own loader over `PlainDataset`, uint8 [B, V, 3, S, S]."""
    endless = RandomSampler(index, replacement=True, num_samples=10**6)
    loader = DataLoader(PlainDataset(index), BATCH, sampler=endless, num_workers=workers, prefetch_factor=4)
    for views in loader:
        yield views.permute(0, 1, 4, 2, 3)


def wds(index: ShardIndex, workers: int, pil: bool) -> Iterator[torch.Tensor]:
    """The same by webdataset, uint8 [B, V, 3, S, S]; `pil`: decoded by PIL, otherwise as our loader does."""
    source = webdataset.WebDataset(
        [str(path) for path in index.paths], resampled=True, shardshuffle=False, nodesplitter=None
    ).shuffle(32)
    if pil:
        source = source.decode("pil").map(_pil_views)
    else:
        size = index.view_size
        source = source.map(lambda sample: _to_views(sample["views.jpg"], size))
    source = source.batched(BATCH, collation_fn=torch.stack, partial=False)
    for views in DataLoader(source, batch_size=None, num_workers=workers, prefetch_factor=4):
        yield views if pil else views.permute(0, 1, 4, 2, 3)


def _bare(data: list[bytes], views: list[int], size: int, photos: int, gate: Any, out: Any) -> None:
    pixels = [np.empty((v, size, size, 3), dtype=np.uint8) for v in views]
    for i in range(8):
        decode_views(data[i % len(data)], views[i % len(data)], size, out=pixels[i % len(data)])
    gate.wait()
    started, used = time.perf_counter(), time.process_time()
    for i in range(photos):
        decode_views(data[i % len(data)], views[i % len(data)], size, out=pixels[0])
    out.put((photos / (time.perf_counter() - started), (time.process_time() - used) / photos * 1e3))


def decode_limit(index: ShardIndex, workers: int, photos: int) -> tuple[float, float]:
    """Bare loops over the bytes of 16 photos, held in memory, into one buffer that stays in the cache.

    Photos per second of all loops, and CPU milliseconds per photo. SystemExit for photos of unequal numbers of views.
    """
    rows = range(min(16, len(index)))
    data = [index._reader.read(int(index.shard[i]), int(index.views_offset[i]), int(index.views_size[i])) for i in rows]
    views = [int(index.num_views[i]) for i in rows]
    if len(set(views)) != 1:
        raise SystemExit("benchmarks.loader needs shards whose first photos have equally many views")
    context = multiprocessing.get_context("fork")
    gate, out = context.Barrier(workers), context.Queue()
    loops = [
        context.Process(target=_bare, args=(data, views, index.view_size, photos // workers, gate, out))
        for _ in range(workers)
    ]
    for loop in loops:
        loop.start()
    found = [out.get() for _ in loops]
    for loop in loops:
        loop.join()
    return sum(rate for rate, _ in found), statistics.mean(cpu for _, cpu in found)


def run(folder: Path, work: Path, venv: Path | None, workers: int, rounds: int, batches: int) -> dict[str, Any]:
    """All contenders in turn, `rounds` times."""
    index = ShardIndex.open(folder, "train")
    asked = {"workers": workers, "batches": batches, "batch": BATCH, "view_size": index.view_size}
    why: dict[str, str] = {}
    contenders: dict[str, Callable[..., tuple[float, float] | str]] = {
        "decode_limit_before": lambda: decode_limit(index, workers, batches * BATCH),
        "ours": lambda: measure(lambda: ours(index, workers), batches, BATCH),
        "decode_limit_after": lambda: decode_limit(index, workers, batches * BATCH),
        "webdataset": lambda: measure(lambda: wds(index, workers, False), batches, BATCH),
        "torch_dataset": lambda: measure(lambda: torch_dataset(index, workers), batches, BATCH),
        "webdataset_pil": lambda: measure(lambda: wds(index, workers, True), batches, BATCH),
        **{name: lambda name=name: ask(name, venv, folder, work, asked) for name in PEERS},
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            if name in why:
                continue
            answer = contender()
            if isinstance(answer, str):
                why[name] = answer
                print(f"round {number}: {name:20s} absent: {answer}", flush=True)
                continue
            rate, cost = answer
            rates[name].append(rate)
            costs[name].append(cost)
            print(f"round {number}: {name:20s} {rate:8.1f} photos/s {cost:7.2f} cpu ms/photo", flush=True)
    result: dict[str, Any] = {
        name: None if name in why else round(statistics.median(found), 1) for name, found in rates.items()
    }
    result.update(
        {f"{name}_cpu_ms": round(statistics.median(found), 2) for name, found in costs.items() if name not in why}
    )
    limits = [(b + a) / 2 for b, a in zip(rates["decode_limit_before"], rates["decode_limit_after"], strict=True)]
    limit_cpu = statistics.median(costs["decode_limit_before"] + costs["decode_limit_after"])
    result["decode_limit"] = round(statistics.median(limits), 1)
    result["of_limit"] = round(statistics.median(o / m for o, m in zip(rates["ours"], limits, strict=True)), 3)
    result["of_limit_cpu"] = round(limit_cpu / statistics.median(costs["ours"]), 3)
    for name in ("webdataset", "torch_dataset", "webdataset_pil", *(name for name in PEERS if name not in why)):
        ratios = [o / t for o, t in zip(rates["ours"], rates[name], strict=True)]
        result[f"over_{name}"] = round(statistics.median(ratios), 3)
        result[f"over_{name}_cpu"] = round(statistics.median(costs[name]) / statistics.median(costs["ours"]), 3)
    result["why_null"] = why
    views = int(index.num_views[0])
    result.update(workers=workers, batch=BATCH, views=views, view_size=index.view_size, rounds=rounds)
    result.update(bytes_per_photo=int(index.views_size.mean()), load=os.getloadavg()[0], cores=os.cpu_count())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--shards", type=Path, help="folder of shards; default: made-up photos in a temporary folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help=f"timed batches of {BATCH} photos per run")
    parser.add_argument("--view_size", type=int, default=512)
    parser.add_argument(
        "--peers-venv", type=Path, help="environment with litdata and mosaicml-streaming (benchmarks/loader_peers.py)"
    )
    options = parser.parse_args()
    out = sys.stdout
    if options.json:
        sys.stdout = io.StringIO()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.shards
        if folder is None:
            folder = Path(temporary) / "shards"
            folder.mkdir()
            build_shards(folder, 128, options.view_size)
        work = Path(temporary) / "peers"
        result = run(folder, work, options.peers_venv, options.workers, options.rounds, options.batches)
    sys.stdout = out
    print(json.dumps(result))


if __name__ == "__main__":
    main()
