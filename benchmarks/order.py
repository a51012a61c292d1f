"""The order as a function: positions per second, memory per sample, exactness of the counts, shards read by
a window of positions, time to the first batch.

`python -m benchmarks.order [--json] [--big 100000000]`

One core. The cumulative table of `--big` weights is built once, in a temporary file, and memory-mapped; the first batch
is then asked for in fresh processes, at the start and at the end of an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from roadwork.data.order import EndlessOrder, EpochOrder, Windows
from roadwork.data.table import mapped_table

BATCH = 4096
_FIRST_BATCH = """
import sys, time
import numpy as np
from roadwork.data.order import EndlessOrder
first, path = int(sys.argv[1]), sys.argv[2]
started = time.perf_counter()
order = EndlessOrder(None, 0, cumulative=np.load(path, mmap_mode="r"))
order.at(np.arange(first, first + 256))
print(time.perf_counter() - started)
"""


def weights_of(n: int) -> npt.NDArray[np.float64]:
    """The default brackets' weights in random order, [n]."""
    return np.random.default_rng(0).choice([5.0, 2.5, 1.0, 0.3], n)


def rate(n: int, positions: int = 1_000_000) -> float:
    """Positions per second at n samples, in batches of BATCH; the median of 5 runs, in processor time."""
    order = EpochOrder(weights_of(n), 0, 1)
    found = []
    for run in range(5):
        asked = np.random.default_rng(run).integers(0, n, positions)
        started = time.process_time()
        for first in range(0, positions, BATCH):
            order.at(asked[first : first + BATCH])
        found.append(positions / (time.process_time() - started))
    return statistics.median(found)


def count_errors(n: int, epochs: int = 30) -> tuple[float, float]:
    """Largest |draws - expected draws| of any sample in one epoch, and over any ten consecutive epochs."""
    weights = weights_of(n)
    order = EndlessOrder(weights, 1)
    expected = weights / weights.sum() * n
    counts = np.stack([np.bincount(order.at(np.arange(e * n, (e + 1) * n)), minlength=n) for e in range(epochs)])
    ten = [counts[e : e + 10].sum(axis=0) - 10 * expected for e in range(epochs - 9)]
    return float(np.abs(counts - expected).max()), float(np.abs(ten).max())


def locality(n: int, per_shard: int = 256, window: int = 8192) -> dict[str, float]:
    """Shards that the positions of one window read, the mean over an epoch, and rates, in both orders."""
    weights, edges = weights_of(n), np.append(np.arange(0, n, per_shard), n)
    found: dict[str, float] = {"window": window, "samples_per_shard": per_shard, "shards": len(edges) - 1}
    for name, windows in (("global", None), ("windowed", Windows(edges, window))):
        order = EpochOrder(weights, 0, 1, windows=windows)
        opened = []
        started = time.process_time()
        samples = [order.at(np.arange(first, min(first + BATCH, n))) for first in range(0, n, BATCH)]
        found[f"epoch_positions_per_s_{name}"] = round(n / (time.process_time() - started))
        shards = np.concatenate(samples) // per_shard
        for first in range(0, n, window):
            opened.append(len(np.unique(shards[first : first + window])))
        found[f"shards_per_window_{name}"] = round(statistics.mean(opened), 1)
        found[f"most_shards_per_window_{name}"] = max(opened)
        found[f"shard_openings_per_epoch_{name}"] = sum(opened)
    return found


def first_batches(n: int) -> dict[str, float]:
    """Seconds to build the table, and to the first 256 positions in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        weights = np.tile([5.0, 2.5, 1.0, 0.3], n // 4)
        started = time.perf_counter()
        table = mapped_table(folder, "train", "benchmark", weights)
        built = time.perf_counter() - started
        path = next(Path(folder).iterdir())
        found = {"table_built_s": built, "bytes_per_sample": table.nbytes / len(table)}
        del table, weights
        for name, first in (("first_batch_at_0_s", 0), ("first_batch_at_end_s", n - 256)):
            command = [sys.executable, "-c", _FIRST_BATCH, str(first), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = float(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--big", type=int, default=10**8, help="samples of the large data set")
    options = parser.parse_args()
    result: dict[str, Any] = {f"positions_per_s_{n}": round(rate(n)) for n in (10**4, 10**6, 10**7)}
    result["positions_per_s"] = result[f"positions_per_s_{10**6}"]
    result["worst_count_error_epoch"], result["worst_count_error_ten"] = count_errors(20_000)
    result["locality"] = locality(10**6)
    result["big"] = options.big
    result.update(first_batches(options.big))
    result.update(batch=BATCH, load=os.getloadavg()[0], cores=os.cpu_count())
    if not options.json:
        for name, value in result.items():
            print(f"{name:26s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
