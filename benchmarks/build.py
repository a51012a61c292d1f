"""Photos per second of `shards.build` beside the limit of bare decoding and encoding.

`python -m benchmarks.build [--photos 1200] [--view-size 512] [--rounds 5] [--enlarge 3] [--json]`

Photos of the embedded benchmark, without masks, as the hub's are, and the same enlarged to a phone's 8 megapixels
(`large_*`). `limit` is a bare loop in as many processes over bytes in memory: the photo decoded as the build decodes it,
and its finished sheet of RGB views encoded at the same quality, before and after each build. The build's own rate counts
while all of its processes have work, as the limit's does: their start and the wait for the last shard come once. Reading,
cutting, resizing, hashing, rows and tars are the build's own. Photos and shards lie in memory (`/dev/shm`, where there is
one), so that cores are compared and not disks. `drawn` is the drawing of the photos themselves, with their masks and
parquet files. Medians over rounds; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from roadwork.data import street
from roadwork.data.build import build
from roadwork.data.decode import encode_views
from roadwork.data.encode import shrink_for
from roadwork.data.images import Photo
from roadwork.data.plan import BuildOptions
from roadwork.data.views import compose_sheet, make_views, scaled_boxes, view_boxes

MEMORY = "/dev/shm"
DISTINCT = 16
"""Photos that the bare loop repeats."""
SHARDS_EACH = 12
"""Shards that each process builds: all have work until fewer shards than processes are left."""


def draw(folder: Path, photos: int, enlarge: int) -> tuple[list[bytes], float]:
    """Parquet without masks in `folder`; returns the first encoded photos and the photos drawn per second."""
    began = time.perf_counter()
    files = street.write_parquet(folder, photos)
    rate = photos / (time.perf_counter() - began)
    first: list[bytes] = []
    for path in files:
        table = pq.read_table(path).drop_columns(["masks"])
        column = table.column("image")
        if enlarge > 1:
            made = pa.array(
                [{**row, "bytes": enlarged(row["bytes"], enlarge)} for row in column.to_pylist()], column.type
            )
            table = table.set_column(table.column_names.index("image"), "image", made)
        first += [row["bytes"] for row in table.column("image").slice(0, DISTINCT - len(first)).to_pylist()]
        pq.write_table(table, path, row_group_size=20)
    return first, rate


def enlarged(data: bytes, factor: int) -> bytes:
    """A photo with `factor` times the side, as a phone's sensor has."""
    rgb = simplejpeg.decode_jpeg(data)
    large = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    jpeg: bytes = simplejpeg.encode_jpeg(large, 92, "RGB", "420")
    return jpeg


def bare(photos: list[bytes], options: BuildOptions, rounds: int, gate: Any, out: Any) -> None:
    """One process of the limit: decode each photo, encode the sheet that the build would make of it."""
    jobs = []
    for data in photos:
        header = Photo(data)
        boxes = view_boxes(header.width, header.height, options.view_size, options.max_views)
        shrink = shrink_for(boxes, options.view_size)
        rgb, _ = header.decode(shrink)
        scaled = scaled_boxes(boxes, (header.width, header.height), rgb.shape)
        jobs.append((data, shrink, compose_sheet(make_views(rgb, scaled, options.view_size))))
    gate.wait()
    began = time.perf_counter()
    for _ in range(rounds):
        for data, shrink, sheet in jobs:
            Photo(data).decode(shrink)
            encode_views(sheet, options.quality)
    out.put(rounds * len(jobs) / (time.perf_counter() - began))


def limit(photos: list[bytes], options: BuildOptions, processes: int) -> float:
    """Photos per second of bare loops, all processes together."""
    context = multiprocessing.get_context("fork")
    gate, out = context.Barrier(processes), context.Queue()
    rounds = max(1, 96 // len(photos))
    loops = [context.Process(target=bare, args=(photos, options, rounds, gate, out)) for _ in range(processes)]
    for loop in loops:
        loop.start()
    found = [out.get() for _ in loops]
    for loop in loops:
        loop.join()
    return float(sum(found))


def rate_of(options: BuildOptions) -> float:
    """Photos per second of a build from its first progress until its processes begin to run out of shards."""
    marks: list[tuple[float, int]] = []

    def progress(what: str, done: int, kept: int, total: int) -> None:
        if what == "encode" and 0 < done <= total - options.processes * options.samples_per_shard:
            marks.append((time.perf_counter(), done))

    build(options, progress)
    first, last = marks[0], marks[-1]
    return (last[1] - first[1]) / (last[0] - first[0])


def run(photos: int, view_size: int, rounds: int, enlarge: int = 1) -> dict[str, Any]:
    """Build `rounds` times, each between two measurements of the limit."""
    processes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        first, drawn = draw(Path(folder) / "source", photos, enlarge)
        figures: dict[str, list[float]] = {"ours": [], "limit_before": [], "limit_after": [], "ratio": []}
        for number in range(rounds):
            options = BuildOptions(
                f"{folder}/source",
                f"{folder}/shards-{number}",
                view_size=view_size,
                processes=processes,
                samples_per_shard=max(photos // (SHARDS_EACH * processes), 1),
            )
            before = limit(first, options, processes)
            ours = rate_of(options)
            after = limit(first, options, processes)
            shutil.rmtree(options.out)
            for values, value in zip(figures.values(), (ours, before, after, 2 * ours / (before + after)), strict=True):
                values.append(value)
    return {
        "benchmark": "build", "photos": photos, "photo_size": f"{1280 * enlarge}x{720 * enlarge}", "view_size": view_size,
        "processes": processes, "rounds": rounds, "drawn": round(drawn, 2),
        "seconds_to_draw_1000": round(1000 / drawn, 1),
        **{name: round(float(statistics.median(values)), 3) for name, values in figures.items()},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1200)
    parser.add_argument("--view-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--enlarge", type=int, default=3, help="sides of the large photos, times 1280x720")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args(argv)
    pa.set_cpu_count(1)
    found = run(options.photos, options.view_size, options.rounds)
    large = run(max(options.photos // 2, 24), options.view_size, options.rounds, options.enlarge)
    names = ("photos", "photo_size", "ours", "limit_before", "limit_after", "ratio")
    found |= {f"large_{name}": large[name] for name in names}
    if not options.json:
        for name, value in found.items():
            print(f"{name:22} {value}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
