"""From a source to a folder of shards: plan, encode on all cores, audit, and commit with the manifest."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roadwork.data import audit
from roadwork.data.encode import (
    BUILD,
    ShardResult,
    build_shard,
    result_name,
    rows_name,
    rows_of,
    start_worker,
    work,
)
from roadwork.data.index import MANIFEST, write_index
from roadwork.data.plan import BuildOptions, Entry, Plan, Rejection, describe_weights, labels_of, latlon_of, make_plan
from roadwork.data.scan import ShardRows
from roadwork.data.shards import SPLITS
from roadwork.data.sources import Source, open_source
from roadwork.data.splits import leaking_groups
from roadwork.data.store import LocalStore, Store, open_store
from roadwork.data.text import text_encoder
from roadwork.data.views import check_view_size
from roadwork.errors import UserError

REJECTED = "rejected.jsonl"
Progress = Callable[[str, int, int, int], None]
"""(`draw` or `encode`, photos done, of them kept from an earlier build, photos in all)."""


@dataclass
class BuildReport:
    """What a build did. manifest is None where only a range of shards was built."""

    manifest: dict[str, Any] | None
    encoded: int
    kept: int
    unchanged: bool = False
    encode_s: float = 0.0
    """Seconds of reading, decoding and encoding alone."""


def build(options: BuildOptions, progress: Progress | None = None) -> BuildReport:
    """Build, or continue and complete, the shards that `options` describe.

    Raises UserError for what the user can mend: options, the source, a full disk, killed workers.
    """
    check_options(options)
    out = options.out
    processes = options.processes or len(os.sched_getaffinity(0))
    try:
        store = open_store(out)
        if isinstance(store, LocalStore):
            (store.folder / BUILD).mkdir(parents=True, exist_ok=True)
        drawn = None if progress is None else lambda done, total: progress("draw", done, 0, total)
        source = open_source(options.source, _drawn_at(store, options), options.seed, processes, drawn).source
        plan = make_plan(source, options)
        previous = _previous(store)
        if previous is not None and previous.get("build", {}).get("fingerprint") != plan.fingerprint():
            store.remove(MANIFEST)  # from here on the folder is no longer what its manifest says
            previous = None
        started = time.monotonic()
        results = encode(plan, source, options, processes, progress)
        encode_s = time.monotonic() - started
        encoded = sum(
            len(shard.entries) for shard, result in zip(plan.shards, results, strict=True) if result and not result.kept
        )
        report = BuildReport(None, encoded, len(plan.entries) - encoded, encode_s=encode_s)
        if any(result is None for result in results):
            report.kept = 0
            return report
        done = [result for result in results if result is not None]
        if previous is not None and not encoded and not previous.get("reweighted"):
            return BuildReport(previous, 0, len(plan.entries), unchanged=True)
        report.manifest = finish(store, plan, source, options, done)
        return report
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left at {out}; make room and run the same command: finished shards are kept"
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
            raise UserError(f"--out {out} cannot be written ({error.strerror})") from error
        raise UserError(f"{out}: {error}; run the same command again: finished shards are kept") from error
    except BrokenProcessPool as error:
        raise UserError(
            "an encoding process was killed (too little memory?); run the same command with fewer --processes: "
            "finished shards are kept"
        ) from error


def check_options(options: BuildOptions) -> None:
    """Refuse what cannot work before anything is read."""
    check_view_size(options.view_size)
    limits = {"max_views": (1, 12), "quality": (1, 100), "processes": (0, 4096), "clusters": (1, 10_000)}
    if options.max_photos < 0:
        raise UserError(f"--max-photos must be 1 or more, or 0 for all; given {options.max_photos}")
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be {low} to {high}; given {value}")
    if options.masks and not Path(options.masks).is_dir():
        raise UserError(f"--masks {options.masks}: no such folder")
    if options.text_encoder:
        text_encoder(options.text_encoder)


def _drawn_at(store: Store, options: BuildOptions) -> Path:
    """Where the embedded benchmark is drawn: beside the shards, or beside the cache where those are remote."""
    if isinstance(store, LocalStore):
        return store.folder / "source"
    return Path("~/.cache/roadwork").expanduser() / f"source-{options.source.replace(':', '-')}-{options.seed}"


def _previous(store: Store) -> dict[str, Any] | None:
    try:
        manifest = json.loads(store.read(MANIFEST))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


# ---------------------------------------------------------------------------------------------- encoding


def encode(
    plan: Plan, source: Source, options: BuildOptions, processes: int, progress: Progress | None
) -> list[ShardResult | None]:
    """Every shard of the plan (or of its range), largest first; results in the plan's order, None outside the range."""
    chosen = range(len(plan.shards))
    if options.shard_range is not None:
        low, high = options.shard_range
        if not 0 <= low < high:
            raise UserError(
                f"--shard-range A:B needs 0 <= A < B; given {low}:{high}; there are {len(plan.shards)} shards"
            )
        chosen = range(min(low, len(plan.shards)), min(high, len(plan.shards)))
    results: list[ShardResult | None] = [None] * len(plan.shards)
    order = sorted(chosen, key=lambda i: -len(plan.shards[i].entries))
    total = sum(len(plan.shards[i].entries) for i in chosen)
    context = multiprocessing.get_context("spawn")
    counter = context.Array("q", 2)

    def tell() -> None:
        if progress is not None:
            progress("encode", counter[0], counter[1], total)

    if min(processes, len(order)) <= 1:
        for i in order:
            results[i] = build_shard(plan.shards[i], source, options, counter)
            tell()
        return results
    pool = ProcessPoolExecutor(min(processes, len(order)), context, start_worker, (source, options, counter))
    try:
        waiting: dict[Future[ShardResult], int] = {pool.submit(work, plan.shards[i]): i for i in order}
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                results[waiting.pop(future)] = future.result()
            tell()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results


# ---------------------------------------------------------------------------------------------- finishing


def finish(
    store: Store, plan: Plan, source: Source, options: BuildOptions, results: Sequence[ShardResult]
) -> dict[str, Any]:
    """Audit what was built, write rejected.jsonl, index and manifest, and remove what an earlier build left."""
    photos = [photo for result in results for photo in result.photos]
    if not photos:
        raise UserError(f"source {source.name}: no photo could be decoded; see {options.out}/{REJECTED}")
    used = {(photo["split"], photo["id"]) for photo in photos}
    entries = [entry for shard in plan.shards for entry in shard.entries if (entry.split, entry.record.id) in used]
    rejected = [*plan.rejected, *(Rejection(**line) for result in results for line in result.rejected)]
    store.write(REJECTED, "".join(line.line() for line in rejected).encode())
    rows = [rows_of(store, result.shard["name"]) for result in results if result.shard is not None]
    _remove_stale(store, {result.shard["name"] for result in results if result.shard is not None}, plan)
    extra = manifest_of(plan, source, options, results, entries, photos, rejected, rows)
    return write_index(options.out, rows, extra)


def manifest_of(
    plan: Plan,
    source: Source,
    options: BuildOptions,
    results: Sequence[ShardResult],
    entries: Sequence[Entry],
    photos: Sequence[dict[str, Any]],
    rejected: Sequence[Rejection],
    rows: Sequence[ShardRows],
) -> dict[str, Any]:
    """Everything in the manifest but the shards and indexes themselves."""
    repairs: Counter[str] = Counter()
    for result in results:
        repairs.update(result.repairs)
    repaired = sum(result.repaired for result in results)
    leaking = leaking_groups([entry.group for entry in entries], [entry.split for entry in entries])
    if leaking:
        raise AssertionError(f"group in two splits: {leaking[:3]}")
    train = [entry for entry in entries if entry.split == "train"]
    weights = np.array([entry.weight for entry in train])
    return {
        "source": {"spec": options.source, "extra_columns_ignored": source.extra_columns}
        | ({"rows_left_out": plan.left_out} if plan.left_out else {}),
        "options": options.encoding()
        | {"seed": options.seed, "val_fraction": options.val_fraction}
        | {"test_fraction": options.test_fraction, "near_duplicates_grouped": options.group_near_duplicates},
        "build": {"fingerprint": plan.fingerprint()},
        "records": {
            "read": plan.rows_read,
            "used": len(entries),
            "used_as_they_are": len(entries) - repaired,
            "used_repaired": repaired,
            "rejected": len(rejected),
        },
        "ids_in_two_splits": sum(bool(entry.record.extra.get("ambiguous_id")) for entry in entries),
        "repairs": dict(sorted(repairs.items())),
        "rejected_reasons": dict(sorted(Counter(line.reason.partition(":")[0] for line in rejected).items())),
        "splits": describe_splits(entries, photos, rows),
        "leak_audit": audit.leak_audit(entries, photos, options.seed),
        "near_duplicates": audit.duplicate_audit(photos),
        "neighbours": audit.neighbour_audit(entries),
        "groups_in_two_splits": leaking,
        **describe_weights(
            latlon_of(train),
            weights,
            labels_of(train),
            plan.target,
            options.brackets,
            options.class_balance,
            options.weight_cap,
        ),
    }


def describe_splits(
    entries: Sequence[Entry], photos: Sequence[dict[str, Any]], rows: Sequence[ShardRows]
) -> dict[str, Any]:
    """Photos, shards, groups, cities, labels and prior of each split that is there."""
    report = {}
    for split in SPLITS:
        mine = [(entry, photo) for entry, photo in zip(entries, photos, strict=True) if entry.split == split]
        if not mine:
            continue
        labels = Counter(entry.record.label for entry, _ in mine)
        known = labels[0] + labels[1]
        report[split] = {
            "photos": len(mine),
            "shards": sum(shard.info.split == split for shard in rows),
            "groups": len({entry.group for entry, _ in mine}),
            "cities": dict(Counter(entry.record.city for entry, _ in mine if entry.record.city).most_common(50)),
            "positive": labels[1],
            "negative": labels[0],
            "unlabelled": labels[None],
            "prior": labels[1] / known if known else None,
            "with_coordinate": sum(entry.record.latitude is not None for entry, _ in mine),
            "with_masks": sum(bool(photo["masks"]) for _, photo in mine),
        }
    return report


def _remove_stale(store: Store, names: set[str], plan: Plan) -> None:
    """Shards and results of an earlier, different build would be read by a glob: they go."""
    for name in store.names():
        shard = name.endswith(".tar") and name.startswith(tuple(f"{split}-" for split in SPLITS))
        if (shard and name not in names) or (name.startswith(".") and name.endswith(".tmp")):
            store.remove(name)
    keep = {kept(shard.name) for shard in plan.shards for kept in (result_name, rows_name)}
    for name in store.names(BUILD):
        if f"{BUILD}/{name}" not in keep:
            store.remove(f"{BUILD}/{name}")
