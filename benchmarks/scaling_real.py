"""What real processes send, hold and read: `python -m benchmarks.scaling_real` writes scaling_measured.json anew.

1, 2 and 4 processes train a tiny network through the real launcher; `benchmarks.scaling` sets its formulas and its
simulated cache beside what they show. For the reads, shards lie on storage that counts what it gives, and gives no more
than so many bytes per second to all processes together (`slow://` of `benchmarks/scaling_probe.py`), so that storage is
what a process waits for, as the page on scale assumes. The loader has no processes of its own: nothing is read ahead.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import machine
from benchmarks.scaling import GIB, MEASURED, ROOT, cache_hits, positions_of_a_node
from roadwork.data.index import MANIFEST, ShardIndex
from roadwork.data.table import open_order, stream_digest
from roadwork.training.counts import StepCounts

PROCESSES = (1, 2, 4)
TINY = [
    "--model.backbone=test_vit", "--model.weights=random", "--model.hidden_dim=32", "--model.num_layers=1",
    "--model.num_heads=4", "--model.num_kv_heads=2", "--model.expert_dim=32", "--model.segmentation_size=8",
    "--model.prune_after=1", "--data.workers=0", "--training.micro_batch=1", "--training.image_every_steps=0",
    "--monitoring.console=false",
]  # fmt: skip
"""A detector with random weights for real processes on two cores."""
PHOTOS, PER_SHARD = 480, 4
"""Photos whose reads are counted, in shards so small that they need few bytes."""
CACHED = 24
"""Shards of mean size that the cache holds."""
BATCH, STEPS = 16, 30
SEED = 0
WINDOW = 64
NAMES = ("group_names", "city_names", "box_table")
"""Columns of an index that hold names, not photos."""
QUICK, SLOW = 4e6, 2e5
"""Bytes per second of storage: where reads are counted, and where a process is to wait for them."""


# --- what is trained on -----------------------------------------------------------------------------------------------


def build_shards(out: Path, photos: int, view_size: int, *more: str) -> None:
    """Real shards of the embedded benchmark."""
    words = ["--source", f"street:{photos}", "--out", str(out), "--view-size", str(view_size), *more]
    subprocess.run([sys.executable, "-m", "shards.build", *words], cwd=ROOT, check=True, stdout=sys.stderr)


def repeated(shards: Path, out: Path, photos: int) -> None:
    """An index of so many photos, its rows those of `shards` again and again; its shards are empty files."""
    manifest = json.loads((shards / MANIFEST).read_text())
    with np.load(shards / manifest["indexes"]["train"]["file"]) as stored:
        table = {name: stored[name] for name in stored.files}
    rows = np.arange(photos) % len(table["label"])
    table = {name: column if name in NAMES else column[rows] for name, column in table.items()}
    table["shard"] = (np.arange(photos) // 256).astype(np.int32)
    digits = np.char.zfill(np.arange(photos).astype(bytes), 12)
    table["id"] = np.char.add(b"photo-", digits)
    out.mkdir()
    np.savez(out / "train.index.npz", allow_pickle=False, **table)
    data = (out / "train.index.npz").read_bytes()
    shard = next(line for line in manifest["shards"] if line["split"] == "train")
    count = np.bincount(table["shard"])
    manifest["shards"] = [shard | {"name": f"train-{k:06d}.tar", "count": int(n)} for k, n in enumerate(count)]
    for line in manifest["shards"]:
        with (out / line["name"]).open("wb") as file:
            file.truncate(shard["bytes"])
    entry = {"file": "train.index.npz", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "count": photos}
    (out / MANIFEST).write_text(json.dumps(manifest | {"indexes": {"train": entry}}))


def opening(folder: Path, photos: int) -> dict[str, float]:
    """What a process needs per photo before its first batch: seconds, bytes held, bytes at most, bytes of the file."""

    def opened() -> Any:
        index = ShardIndex.open(folder, "train")
        order = open_order(index, SEED)
        stream_digest(index)
        return index, order, StepCounts(index, order, BATCH, photos, 1, 1)

    began = time.perf_counter()
    opened()
    seconds = time.perf_counter() - began  # the table of the order was made on the way, as at a run's first start
    tracemalloc.start()
    kept = opened()
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return {
        "photos": photos,
        "seconds_per_photo": seconds / photos,
        "held_bytes_per_photo": held / photos,
        "most_bytes_per_photo": most / photos,
        "file_bytes_per_photo": (folder / "train.index.npz").stat().st_size / photos,
    }


# --- probes -----------------------------------------------------------------------------------------------------------


def launch(processes: int, shards: str, folder: Path, *options: str, rate: float = QUICK) -> list[dict[str, Any]]:
    """Train on real processes in `folder`/run; what each rank wrote (`benchmarks/scaling_probe.py`)."""
    stem = folder / "rank"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    launcher += ["--main_process_port", "0"]  # any free one
    words = [*launcher, "--num_processes", str(processes), "benchmarks/scaling_probe.py", str(stem)]
    given = [f"--run.dir={folder / 'run'}", f"--data.shards={shards}", f"--seed={SEED}", *TINY, *options]
    folder.mkdir()
    environment = os.environ | {"SLOW_BYTES_PER_S": str(rate), "SLOW_LOCK": str(folder / "wire.lock")}
    subprocess.run([sys.executable, *words, *given], cwd=ROOT, check=True, stdout=sys.stderr, env=environment)
    return [json.loads(Path(f"{stem}-{rank}.json").read_text()) for rank in range(processes)]


def sent_and_held(processes: int, shards: Path, folder: Path) -> dict[str, Any]:
    """One optimizer step: bytes sent and held by each rank, bytes of the checkpoint."""
    ranks = launch(processes, str(shards), folder, "--training.global_batch=8", "--training.max_steps=1")
    (newest,) = (folder / "run" / "checkpoints").glob("step-*")
    return {
        "processes": processes,
        "parameters": ranks[0]["parameters"],
        "micro_steps": ranks[0]["micro_steps"],
        "sent": ranks[0]["sent"],
        "held_most": {name: max(rank["held"][name] for rank in ranks) for name in ranks[0]["held"]},
        "held_sum": {name: sum(rank["held"][name] for rank in ranks) for name in ranks[0]["held"]},
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.glob("*.safetensors")),
    }


def reads(processes: int, shards: Path, folder: Path, window: int) -> dict[str, Any]:
    """Many steps with a small cache: bytes of training shards that were fetched, and those that the simulation says."""
    index = ShardIndex.open(shards, "train")
    mean = sum(shard.bytes for shard in index.shards) / len(index.shards)
    order = open_order(index, SEED, window=window)
    positions = positions_of_a_node(processes, processes, 1, BATCH // processes, STEPS)
    asked = index.shard[order.at(positions)].tolist()
    options = ["--data.order=windowed", f"--data.window={window}"] if window else []
    options += [f"--training.global_batch={BATCH}", f"--training.max_steps={STEPS}", f"--data.cache_dir={folder}/cache"]
    ranks = launch(processes, f"slow://{shards}", folder, *options, f"--data.cache_gib={CACHED * mean / GIB}")
    fetched = [size for rank in ranks for name, size in rank["fetched"] if name.startswith("train-")]
    return {
        "processes": processes,
        "window": window,
        "photos_read": len(asked),
        "shard_bytes": mean,
        "simulated_hits": cache_hits(asked, CACHED),
        "simulated_bytes": (1 - cache_hits(asked, CACHED)) * len(asked) * mean,
        "fetched_bytes": sum(fetched),
    }


def start(processes: int, shards: Path, folder: Path) -> dict[str, Any]:
    """Seconds until the shards are open and until the first batch is there, from slow storage; and what was expected."""
    index = ShardIndex.open(shards, "train")
    first = index.shard[open_order(index, SEED).at(np.arange(processes))]
    options = ["--training.global_batch=4", "--training.max_steps=1", f"--data.cache_dir={folder}/cache"]
    ranks = launch(processes, f"slow://{shards}", folder, *options, rate=SLOW)
    manifest = (shards / MANIFEST).stat().st_size  # read for each split
    opened = processes * sum(index.manifest["indexes"][split]["bytes"] + manifest for split in ("train", "val"))
    return {
        "processes": processes,
        "opening_s": max(rank["opening_ended"] for rank in ranks) - min(rank["opening_began"] for rank in ranks),
        "expected_opening_s": opened / SLOW,
        "first_wait_s": max(rank["first_wait_s"] for rank in ranks),
        "expected_first_wait_s": sum(index.shards[number].bytes for number in np.unique(first)) / SLOW,
    }


def measure(folder: Path) -> dict[str, Any]:
    """Everything of scaling_measured.json but the GPU's step, which stays as it is."""
    stored: dict[str, Any] = json.loads(MEASURED.read_text())
    stored["machine"] = machine()
    large, small, many = (folder / name for name in ("large", "small", "many"))
    build_shards(large, 24, 512)
    build_shards(small, 40, 64)
    build_shards(many, PHOTOS, 64, "--samples-per-shard", str(PER_SHARD))
    repeated(many, folder / "repeated", 10**6)
    stored["photos"] = {"view_size": 512, "bytes": round(float(ShardIndex.open(large, "train").views_size.mean()))}
    stored["opening"] = opening(folder / "repeated", 10**6)
    stored["real_processes"] = [sent_and_held(n, small, folder / f"sent-{n}") for n in PROCESSES]
    stored["real_reads"] = [reads(n, many, folder / f"reads-{n}-{w}", w) for w in (0, WINDOW) for n in PROCESSES]
    stored["real_starts"] = [start(n, many, folder / f"start-{n}") for n in PROCESSES]
    return stored


def main() -> int:
    """Measure, and keep what was found."""
    with tempfile.TemporaryDirectory() as folder:
        MEASURED.write_text(json.dumps(measure(Path(folder)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
