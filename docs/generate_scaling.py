"""Writes docs/scaling.md from benchmarks/scaling.py: `python docs/generate_scaling.py [--check]`.

With --check nothing is written; the exit status is 1 where the page is not what the calculation says.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
sys.path.insert(0, str(ROOT))

from benchmarks import scaling  # noqa: E402 - the repository is put on the path above
from benchmarks import scaling_real as real  # noqa: E402
from benchmarks.results import newest  # noqa: E402
from docs.generated_page import write_or_check  # noqa: E402

HEAD = """# Scale

<!-- Written by `python docs/generate_scaling.py` from benchmarks/scaling.py. Do not edit: change the code instead. -->

What happens to this trainer at 10^9 photos and 1,024 processes, on paper and in simulation. Nobody has run it at that size.
The order is the real one, asked for the positions of that run.
Reads, bytes and times follow a simulation and formulas that the last section compares with real processes.
Speeds of wires and disks are assumed:
"""


def number(value: float) -> str:
    """A figure with three digits that count."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(head: list[str], rows: list[list[Any]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell if isinstance(cell, str) else number(cell) for cell in row) + " |"
    yield ""


def data_plane(found: dict[str, Any]) -> Iterator[str]:
    """Order, index and cache."""
    photo, opening, rows = found["measured"]["photos"], found["measured"]["opening"], found["data_plane"]
    yield "## Order, index and cache, 1,024 processes on 128 nodes\n"
    yield (
        f"A photo's views at {photo['view_size']} px are {number(photo['bytes'])} bytes, counted on shards of the embedded "
        f"benchmark; {scaling.PER_SHARD} photos a shard, {scaling.PHOTOS_PER_PROCESS} photos per process and step, "
        f"{scaling.STEPS} steps.\n"
    )
    yield from _reads(rows)
    yield from _first_batch(opening, rows)
    yield from _data_breaks(photo, rows[-1])


def _columns(rows: list[dict[str, Any]], names: dict[str, str]) -> Iterator[str]:
    """A table of some keys of the data plane's rows under words of their own."""
    yield from table(list(names.values()), [[row[key] for key in names] for row in rows])


def _reads(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What is read in the exact order, and in the windowed one."""
    yield from _columns(
        rows,
        {
            "photos": "photos",
            "shards": "shards",
            "reads_per_touched_shard": "reads per shard that a step touches",
            "cache_hits": "cache hits on a node",
            "remote_bytes_per_photo": "bytes per photo, remote",
            "local_bytes_per_photo": "bytes per photo, local",
        },
    )
    yield (
        "The same reads with `data.order=windowed`, in windows of so many photos. The nodes share each window, so a large "
        "one is read by all of them:\n"
    )
    yield from table(
        ["photos", *(f"{words}, {w:,}" for w in scaling.WINDOWS for words in ("cache hits", "bytes per photo, remote"))],
        [[r["photos"], *(r[f"{key}_{w}"] for w in scaling.WINDOWS for key in ("cache_hits", "remote_bytes_per_photo"))]
         for r in rows],
    )  # fmt: skip


def _first_batch(opening: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    """Memory, and what stands before the first batch."""
    yield "### Memory, and the time to the first batch\n"
    yield (
        f"On an index of {opening['photos']:,} photos, each row costs a process {opening['held_bytes_per_photo']:.0f} bytes "
        f"that it keeps, {opening['most_bytes_per_photo']:.0f} while it opens the index, and "
        f"{1e6 * opening['seconds_per_photo']:.2g} microseconds on one core: its hash, its columns, the name of the stream "
        "and, at a run's first start, the table of the order, which is mapped afterwards. The index file "
        f"has {opening['file_bytes_per_photo']:.0f} bytes per photo; behind a URL they come on top while it is opened.\n"
    )
    yield from _columns(
        rows,
        {
            "photos": "photos",
            "table_gib": "table of the order, GiB",
            "index_gib_per_process": "index per process, GiB",
            "index_gib_per_node": "per node",
            "opening_gib_per_node": "per node while opening",
            "index_read_s": "reading the index, s",
            "opening_s": "opening it, s",
            "looks_s": "looking at each shard, s",
            "first_shards_s": "first shards, s",
        },
    )
    yield (
        "Before the first batch a node's processes read their index from shared storage and open it. Where shards lie in a "
        "folder, the first process looks at the size of each; where they lie behind a URL, all fetch those of their first "
        "photos. Decoding one micro-batch comes on top.\n"
    )


def _data_breaks(photo: dict[str, Any], last: dict[str, Any]) -> Iterator[str]:
    """Where the data plane breaks first; last: the row of the largest data set."""
    memory, photos = scaling.ASSUMED["memory of a node, GiB"], last["photos"]
    most = memory / last["opening_gib_per_node"] * photos
    fits = scaling.ASSUMED["cache of a node, GiB"] * scaling.GIB / photo["bytes"]
    yield "**Where it breaks first, and what then**\n"
    yield (
        f"1. The cache, at {number(fits)} photos. The exact order reads everywhere at once: a data set that the cache of a "
        f"node does not hold is fetched a shard for each photo, {number(last['remote_bytes_per_photo'])} bytes instead of "
        f"{number(last['local_bytes_per_photo'])}. Then: `data.order=windowed`, which at {number(last['photos'])} photos "
        f"fetches {', '.join(_fetched(last, window) for window in scaling.WINDOWS)}{_openings()}. Or shards on a disk that "
        "all nodes reach, where a photo is one read of its own bytes, or a cache (`data.cache_gib`) that holds the node's "
        "data set."
    )
    yield (
        f"2. The index, at {number(most)} photos: each process reads all of it, so {scaling.NODE} processes fill a node's "
        f"{memory:g} GiB while they open it. Then: fewer processes per node. An index that processes share is not built."
    )
    yield (
        f"3. The start, at about the same size: at {number(photos)} photos a process opens the index for "
        f"{number(last['opening_s'] / 60)} minutes, and the first of each node looks at shards for "
        f"{number(last['looks_s'] / 60)} more. Then: more photos per shard (`shards.build --samples-per-shard`) "
        "where shards lie in a folder, and fewer starts: a relaunch pays the same."
    )
    yield (
        f"4. The order itself holds: one float64 per photo, {number(last['table_gib'])} GiB at 10^9 for each process, "
        "or for each node where they share its map (`roadwork/data/table.py`). A position "
        f"takes about {math.ceil(math.log2(photos))} steps of a binary search there.\n"
    )


def _fetched(row: dict[str, Any], window: int) -> str:
    return f"{number(row[f'remote_bytes_per_photo_{window}'])} with `data.window={window}`"


def _openings() -> str:
    """What the dated result of `benchmarks.order` counted, where there is one."""
    counted = newest().get("order", {}).get("figures", {}).get("locality")
    if not counted:
        return ""
    one, other = (counted[f"shard_openings_per_epoch_{name}"] for name in ("windowed", "global"))
    return f" (`python -m benchmarks.order` counted {one:,} openings of a shard in an epoch of a million, beside {other:,})"


def engine(found: dict[str, Any]) -> Iterator[str]:
    """Steps and memory."""
    step = found["measured"]["gpu_step"]
    yield "## A step from 1 to 1,024 GPUs\n"
    yield f"Computing: {step['origin']}; {step['views_per_s']:g} views/s, {step['memory_gib']:g} GiB.\n"
    yield (
        "Sending: fp32 gradients in one reduce-scatter and bf16 weights in one gather, both once a step whatever the "
        "accumulation. The last column is without `engine.hold_gradients`: DeepSpeed then sums gradients with an all-reduce "
        f"in EVERY micro-step, in buckets of {number(found['bucket_elements'])} elements (`ds_configs/zero2_bf16.json`). "
        "Nothing is overlapped here, so this is the pessimistic side; each GPU keeps its 96 views per step.\n"
    )
    yield from table(
        ["GPUs", "sent per GPU and step, GB", "computing, s", "wire, s", "latency, s", "share of time computing", "views/s",
         "share, summed in every micro-step"],
        [[r["gpus"], r["sent_gb"], r["compute_s"], r["wire_s"], r["latency_s"], r["efficiency"], r["views_per_s"],
          r["efficiency_each"]]
         for r in found["steps"]],
    )  # fmt: skip
    worst = found["steps"][-1]
    yield "**Where it breaks first, and what then**\n"
    yield (
        f"1. Sending: {number(worst['wire_s'])} s of a step at {worst['gpus']:,} GPUs. Then: more accumulation, or a larger "
        "`training.micro_batch` (with `model.activation_checkpointing`); either lowers its share."
    )
    yield (
        f"2. The latency of long rings: {number(worst['latency_s'])} s of the same step. Trees of the communication library "
        "shorten it.\n"
    )
    yield "## Memory and checkpoints of each backbone\n"
    yield (
        "GiB per process without activations and heads: bf16 weights and fp32 gradients whole, and in fp32 over the "
        "processes reduced gradients, masters, moments and average. "
        "A checkpoint holds 16 bytes per parameter, on rank 0's memory until it is written. "
        f"{_activations(step, found['memory'])}\n"
    )
    yield from table(
        ["backbone", "parameters", "1 process", "8", "64", "1,024", "checkpoint, GB", "gathering, s", "writing behind, s"],
        [[f"`{r['backbone']}`", r["parameters"], *(r[f"gib_on_{n}"] for n in (1, 8, 64, 1024)), r["checkpoint_gb"],
          r["checkpoint_gather_s"], r["checkpoint_write_s"]] for r in found["memory"]],
    )  # fmt: skip
    yield (
        "**Where it breaks first:** rank 0 alone writes, and one disk takes the whole checkpoint; training waits for the "
        "gathering only. Then: a faster disk, or a larger `checkpoint.every_steps`. Writing by all ranks is not built.\n"
    )


def _activations(step: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What the measured step held beyond the table."""
    (row,) = (r for r in rows if r["backbone"] == step["backbone"])
    return (
        f"The measured step of `{step['backbone']}` held {step['memory_gib']:g} GiB on one GPU with "
        f"{step['views_per_micro_step']:g} views at a time, where this table says {row['gib_on_1']:.1f}: the rest is "
        "activations, which fall with `training.micro_batch` and with `model.activation_checkpointing`."
    )


def agreement(found: dict[str, Any]) -> Iterator[str]:
    """Real processes against the formulas."""
    rows = found["agreement"]
    network = found["measured"]["real_processes"][0]["parameters"]
    yield "## Against real processes\n"
    yield (
        f"`python -m benchmarks.scaling_real` trains one step of a network of {network:,} parameters on "
        "1, 2 and 4 processes over gloo and counts what each rank gives to collectives and holds; "
        "gloo's all-reduce carries the gradients. "
        "Counted over formula, the "
        "largest of the ranks; partitions are padded, a step also reduces its few logged numbers, files have headers,"
        " and one process sends nothing.\n"
    )
    columns = ["processes", "all_reduce", "all_gather", "weights_bf16", "masters", "moments", "average", "checkpoint"]
    yield from table(
        ["processes", "all-reduce", "all-gather", "weights", "masters", "moments", "average", "checkpoint"],
        [[f"{r[name]:.4f}" if name != "processes" else str(r[name]) for name in columns] for r in rows],
    )  # fmt: skip
    yield from _real_reads(found)
    yield from _real_starts(found)
    yield "Gradients, activations and the time of a step are not compared: they need GPUs of that number."


def _real_reads(found: dict[str, Any]) -> Iterator[str]:
    """The simulated cache beside what was fetched."""
    yield (
        f"The same trains {real.STEPS} steps on the training part of {real.PHOTOS} photos, in shards of {real.PER_SHARD} "
        "behind a URL, through a "
        f"cache of {real.CACHED} shards. Shards are not all of one size, and a process keeps open the last ones that it "
        "read, which the simulation leaves out.\n"
    )
    yield from table(
        ["processes", "order", "cache hits, simulated", "counted", "bytes fetched over simulated"],
        [[str(r["processes"]), f"windowed by {r['window']}" if r["window"] else "exact", r["hits_simulated"],
          r["hits_counted"], f"{r['fetched']:.3f}"] for r in found["reads"]],
    )  # fmt: skip


def _real_starts(found: dict[str, Any]) -> Iterator[str]:
    """The time to the first batch beside what the bytes say."""
    yield (
        f"And its time to the first batch, from storage that gives {number(real.SLOW)} bytes per second to all processes "
        "together, in seconds; expected: the bytes of index and manifest for each process, and of the first photos' shards, "
        "at that speed. Opening lasts from the first rank's question to the last one's answer. Ranks do not ask for shards at "
        "the same instant, so the longest of their waits for them is at most what is expected.\n"
    )
    columns = ("expected_opening_s", "opening_s", "expected_first_wait_s", "first_wait_s")
    yield from table(
        ["processes", "opening, expected", "measured", "first shards, expected", "measured"],
        [[str(r["processes"]), *(r[name] for name in columns)] for r in found["starts"]],
    )


def page() -> str:
    """The whole file."""
    found = scaling.figures()
    assumed = "\n".join(f"- {name}: {number(value)}" for name, value in found["assumed"].items())
    parts = [HEAD, assumed, "", *data_plane(found), *engine(found), *agreement(found)]
    return "\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say whether it is stale."""
    return write_or_check(PAGE, page(), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
