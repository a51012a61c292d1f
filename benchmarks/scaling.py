"""Scale on paper and in simulation: `python -m benchmarks.scaling [--json]`.

Nothing here is timed: the same figures come out everywhere. The order of 10^9 photos is the real one (`EpochOrder`, over
whole shards of equal weight), the cache is a least-recently-used one as `ShardCache` is, bytes are counted by formulas.
What 1, 2 and 4 real processes show beside them stands in scaling_measured.json (`python -m benchmarks.scaling_real`
writes it). Speeds of disks and wires are ASSUMED and stand in `ASSUMED`; the speed of a GPU is that of the newest GPU
result of `benchmarks.train_step`, and while there is none a prototype's, which stands in the same file with its origin.
The last line is one JSON object; `python docs/generate_scaling.py` writes docs/scaling.md from it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.results import RESULTS
from roadwork.config import DataConfig
from roadwork.data.order import EpochOrder, Windows, cumulative_table

Ints = npt.NDArray[np.int64]

ROOT = Path(__file__).resolve().parent.parent
MEASURED = Path(__file__).with_name("scaling_measured.json")
GIB = 2**30
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
PHOTOS = (10**6, 10**7, 10**8, 10**9)
NODE = 8
"""Processes on one node."""
PER_SHARD = 256
MICRO_BATCH, MICRO_STEPS = 2, 4
PHOTOS_PER_PROCESS = MICRO_BATCH * MICRO_STEPS
"""Photos of one process in one optimizer step: 96 views, as in the measured step."""
WINDOWS = (DataConfig().window, 512)
"""Photos of a window of `data.order=windowed`: the default, and one that a node's micro-batch mostly stays within."""
ENGINE = ROOT / "ds_configs" / "zero2_bf16.json"
STEPS = 100
"""Simulated optimizer steps."""
BACKBONES = (
    "efficientnet_lite0",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_dinov3",
    "vit_large_patch16_dinov3",
    "vit_huge_plus_patch16_dinov3",
)
ASSUMED = {
    "wire between nodes, GB/s per GPU": 50.0,
    "wire within a node, GB/s per GPU": 450.0,
    "latency of one hop of a ring, microseconds": 5.0,
    "shared storage, GB/s per node": 2.0,
    "one look at a file of shared storage, microseconds": 200.0,
    "disk of rank 0, GB/s": 2.0,
    "memory of a node, GiB": 1024.0,
    "cache of a node, GiB": 50.0,
}
"""Not measured: what the paper figures stand on."""


# --- data plane -------------------------------------------------------------------------------------------------------


def data_plane(photos: int, processes: int, photo_bytes: float, opening: dict[str, float]) -> dict[str, float]:
    """Reads, cache and memory of one node of a run over so many photos, simulated with the real order.

    opening: what one photo costs a process that opens its row of the index (`benchmarks.scaling_real.opening`).
    """
    shards = -(-photos // PER_SHARD)
    table = cumulative_table(np.random.default_rng(0).choice([5.0, 2.5, 1.0, 0.3], shards))
    shard_bytes = PER_SHARD * photo_bytes
    capacity = int(ASSUMED["cache of a node, GiB"] * GIB / shard_bytes)
    batch = PHOTOS_PER_PROCESS * processes
    steps, ranks = min(STEPS, photos // batch), min(NODE, processes)
    reads = positions_of_a_node(ranks, processes, MICRO_BATCH, MICRO_STEPS, steps)

    def order(window: int | None) -> EpochOrder:
        windows = Windows(np.arange(shards + 1), window) if window else None
        return EpochOrder(None, 0, 0, num_draws=photos, cumulative=table, windows=windows)

    def hits(window: int | None) -> float:
        return cache_hits(order(window).at(reads).tolist(), capacity)

    exact, first = hits(None), order(None).at(reads[: ranks * MICRO_BATCH])
    windowed = {window: hits(window) for window in WINDOWS}
    storage = ASSUMED["shared storage, GB/s per node"] * 1e9
    return {
        "photos": photos,
        "shards": shards,
        "reads_per_touched_shard": batch / len(np.unique(order(None).at(np.arange(batch)))),
        "cache_shards": capacity,
        "cache_hits": exact,
        "remote_bytes_per_photo": (1 - exact) * shard_bytes,
        **{f"cache_hits_{window}": share for window, share in windowed.items()},
        **{f"remote_bytes_per_photo_{window}": (1 - share) * shard_bytes for window, share in windowed.items()},
        "local_bytes_per_photo": photo_bytes,
        "table_gib": 8 * photos / GIB,
        "index_gib_per_process": opening["held_bytes_per_photo"] * photos / GIB,
        "index_gib_per_node": NODE * opening["held_bytes_per_photo"] * photos / GIB,
        "opening_gib_per_node": NODE * opening["most_bytes_per_photo"] * photos / GIB,
        "index_read_s": opening["file_bytes_per_photo"] * photos * NODE / storage,
        "opening_s": opening["seconds_per_photo"] * photos,
        "looks_s": shards * ASSUMED["one look at a file of shared storage, microseconds"] * 1e-6,
        "first_shards_s": len(np.unique(first)) * shard_bytes / storage,
    }


def positions_of_a_node(ranks: int, processes: int, micro_batch: int, micro_steps: int, steps: int) -> Ints:
    """Positions int64 [reads] that the first ranks of so many processes read in so many steps, in the loader's order."""
    micro = micro_batch * processes
    begins = np.arange(steps * micro_steps)[:, None] * micro
    return (begins + np.arange(ranks * micro_batch)).ravel()


def cache_hits(reads: list[int], capacity: int) -> float:
    """Share of reads that find their shard in a cache that drops the least recently used."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for shard in reads:
        if shard in held:
            hits += 1
            held.move_to_end(shard)
            continue
        if len(held) >= capacity:
            held.popitem(last=False)
        held[shard] = None
    return hits / len(reads)


# --- engine -----------------------------------------------------------------------------------------------------------


def payload(parameters: int) -> dict[str, int]:
    """Bytes that a rank gives to each collective in one optimizer step: fp32 gradients and bf16 weights, once each.

    Over gloo, which has no reduce-scatter, an all-reduce carries the gradients instead.
    """
    return {"reduce_scatter": 4 * parameters, "all_gather": 2 * parameters}


def payload_each(parameters: int, micro_steps: int) -> dict[str, int]:
    """The same where DeepSpeed reduces every micro-batch (`engine.hold_gradients false`): an all-reduce of all buckets."""
    return {"all_reduce": 4 * parameters * micro_steps, "all_gather": 2 * parameters}


def on_the_wire(given: dict[str, int], gpus: int) -> float:
    """Bytes that one rank sends in a ring: 2 (N-1)/N of an all-reduce, (N-1)/N of its two halves (Patarasuk and Yuan 2009)."""
    return (gpus - 1) / gpus * sum(size * (2 if name == "all_reduce" else 1) for name, size in given.items())


def held(parameters: int, gpus: int) -> dict[str, float]:
    """Bytes on one rank, activations aside; fp32 gradients whole, as they are held between micro-batches, and their part."""
    return {
        "weights_bf16": 2 * parameters,
        "gradients": 4 * parameters + (4 * parameters / gpus if gpus > 1 else 0),
        "masters": 4 * parameters / gpus,
        "moments": 8 * parameters / gpus,
        "average": 4 * parameters / gpus,
    }


def step_of(gpus: int, step: dict[str, Any]) -> dict[str, float]:
    """One optimizer step of the measured network on so many GPUs, nothing overlapped.

    `efficiency_each`: where gradients are reduced at each micro-batch instead.
    """
    views = step["views_per_micro_step"] * step["micro_steps"]
    compute = views / step["views_per_s"]
    sent = on_the_wire(payload(step["parameters"]), gpus)
    wire = ASSUMED["wire within a node, GB/s per GPU" if gpus <= NODE else "wire between nodes, GB/s per GPU"] * 1e9
    hop = (gpus - 1) * ASSUMED["latency of one hop of a ring, microseconds"] * 1e-6
    hops = 2 * hop  # a reduce-scatter and a gather
    wait = sent / wire + hops
    buckets = math.ceil(step["parameters"] / bucket_elements()) * step["micro_steps"]
    each = on_the_wire(payload_each(step["parameters"], step["micro_steps"]), gpus) / wire + (2 * buckets + 1) * hop
    return {
        "gpus": gpus, "sent_gb": sent / 1e9, "compute_s": compute, "wire_s": sent / wire, "latency_s": hops,
        "efficiency": compute / (compute + wait), "efficiency_each": compute / (compute + each),
        "views_per_s": gpus * views / (compute + wait),
    }  # fmt: skip


def bucket_elements() -> int:
    """Elements of a gradient bucket of the engine on GPUs."""
    return int(json.loads(ENGINE.read_text())["zero_optimization"]["reduce_bucket_size"])


def gpu_step(prototype: dict[str, Any], folder: Path = RESULTS) -> dict[str, Any]:
    """The trainer's own step on a GPU, from the newest dated result with the prototype's backbone; else the prototype's."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("????-??-??-train_step*.json"))]
    own = [r for r in records if r["figures"]["gpu"] and r["figures"]["backbone"] == prototype["backbone"]]
    if not own:
        return prototype
    record, figures = own[-1], own[-1]["figures"]
    detail = figures["zero2_detail"]
    return {
        "origin": f"this trainer's whole step, measured on one {figures['device']} by `{record['command']}`"
        f" ({record['date']}, commit {record['commit']})",
        "backbone": figures["backbone"],
        "parameters": backbone_parameters(figures["backbone"]),
        "views_per_micro_step": figures["zero2"] * detail["step_s"] / figures["accumulation"],
        "micro_steps": figures["accumulation"],
        "views_per_s": figures["zero2"],
        "memory_gib": detail["peak_memory_gib"],
    }


def backbone_parameters(name: str) -> int:
    """Parameters of a timm backbone without a classifier; nothing is allocated."""
    import timm
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())


def memory(name: str) -> dict[str, Any]:
    """GiB per rank and bytes of a checkpoint of one backbone, heads aside."""
    parameters = backbone_parameters(name)
    checkpoint = 16 * parameters
    return {
        "backbone": name,
        "parameters": parameters,
        **{f"gib_on_{gpus}": sum(held(parameters, gpus).values()) / GIB for gpus in (1, 8, 64, 1024)},
        "checkpoint_gb": checkpoint / 1e9,
        "checkpoint_write_s": checkpoint / (ASSUMED["disk of rank 0, GB/s"] * 1e9),
        "checkpoint_gather_s": 2 * checkpoint / (ASSUMED["wire between nodes, GB/s per GPU"] * 1e9),
    }


# --- against real processes ---------------------------------------------------------------------------------------------


def agreement(found: dict[str, Any]) -> dict[str, float]:
    """Counted bytes over those of the formulas: 1 where they agree."""
    n, parameters = found["processes"], found["parameters"]
    given, formula = payload(parameters), held(parameters, n)
    sent = found["sent"]
    gathered = sent.get("all_gather_into_tensor", 0) + sent.get("all_gather", 0)
    return {
        "processes": n,
        "all_reduce": sent.get("all_reduce", 0) / given["reduce_scatter"],
        "all_gather": gathered / given["all_gather"],
        **{name: found["held_most"][name] / formula[name] for name in found["held_most"]},
        "checkpoint": found["checkpoint_bytes"] / (16 * parameters),
    }


def read_agreement(found: dict[str, Any]) -> dict[str, float]:
    """What real processes fetched beside the simulation: shares of reads that found their shard, and bytes over bytes."""
    counted = found["fetched_bytes"] / (found["photos_read"] * found["shard_bytes"])
    return {
        "processes": found["processes"],
        "window": found["window"],
        "hits_simulated": found["simulated_hits"],
        "hits_counted": 1 - counted,
        "fetched": found["fetched_bytes"] / found["simulated_bytes"],
    }


def figures() -> dict[str, Any]:
    """All that docs/scaling.md says."""
    measured = json.loads(MEASURED.read_text())
    photo, step = measured["photos"]["bytes"], gpu_step(measured["gpu_step"])
    return {
        "benchmark": "scaling",
        "assumed": ASSUMED,
        "measured": measured | {"gpu_step": step},
        "bucket_elements": bucket_elements(),
        "data_plane": [data_plane(n, 1024, photo, measured["opening"]) for n in PHOTOS],
        "steps": [step_of(gpus, step) for gpus in GPUS],
        "memory": [memory(name) for name in BACKBONES],
        "agreement": [agreement(found) for found in measured["real_processes"]],
        "reads": [read_agreement(found) for found in measured["real_reads"]],
        "starts": measured["real_starts"],
    }


def main(argv: list[str] | None = None) -> int:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    options = parser.parse_args(argv)
    found = figures()
    if not options.json:
        for name in ("data_plane", "steps", "memory", "agreement", "reads", "starts"):
            for line in found[name]:
                print(name, json.dumps(line))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
