"""Does a folder of shards hold what its manifest says? Every byte, every count, every fault named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from roadwork.data.index import MANIFEST, ShardIndex, file_in, read_manifest, root_of, shards_in
from roadwork.data.scan import ShardRows, scan_shard
from roadwork.data.shards import SPLITS
from roadwork.data.splits import leaking_groups
from roadwork.data.store import Store, open_store
from roadwork.errors import UserError

_COPIED = ("label", "latitude", "longitude", "weather", "daytime", "scene", "width", "height")
_PLACES = ("views", "meta", "masks")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(folder: str | Path, pixels: bool = False) -> list[str]:
    """Every fault of a folder of shards, one line each; empty where all is well.

    folder: or a URL that fsspec knows; each shard is then fetched for a moment.
    pixels: also decode every photo and mask. A folder that is not there at all raises UserError.
    """
    root = root_of(folder)
    if isinstance(root, Path) and not root.is_dir():
        read_manifest(root)  # raises, saying what to run
    store = open_store(root)
    try:
        manifest = read_manifest(root)
    except UserError as error:
        return [str(error)]
    faults: list[str] = []
    scanned: dict[str, list[ShardRows]] = {split: [] for split in SPLITS}
    for line in manifest["shards"]:
        faults += _shard_faults(root, store, line, scanned)
    known = {line["name"] for line in manifest["shards"]}
    faults += [f"{file_in(root, name)}: not in the manifest" for name in shards_in(store) if name not in known]
    groups: list[str] = []
    splits: list[str] = []
    for split in manifest["indexes"]:
        try:
            index = ShardIndex.open(root, split)
        except UserError as error:
            if str(error) not in faults:
                faults.append(str(error))
            continue
        groups += index.group.tolist()
        splits += [split] * len(index)
        if len(scanned[split]) == len(index.shards):
            faults += _index_faults(root, index, scanned[split], bool(manifest.get("reweighted")))
        if pixels:
            faults += _pixel_faults(root, index)
    faults += [f"{root}: group {group!r} is in more than one split" for group in leaking_groups(groups, splits)]
    faults += _count_faults(root, store, manifest)
    return faults


def _shard_faults(
    root: Path | str, store: Store, line: dict[str, Any], scanned: dict[str, list[ShardRows]]
) -> list[str]:
    path, name = file_in(root, line["name"]), line["name"]
    size = store.size(name)
    if size is None:
        return [f"{path}: missing"]
    faults = []
    if size != line["bytes"]:
        faults.append(f"{path}: {size} bytes, the manifest says {line['bytes']}")
    with store.fetched(name) as here:
        if sha256_of(here) != line["sha256"]:
            faults.append(f"{path}: its SHA-256 differs from the manifest's")
        try:
            rows = scan_shard(here, path)
        except UserError as error:
            return [*faults, str(error)]
    if rows.info.count != line["count"]:
        faults.append(f"{path}: {rows.info.count} samples, the manifest says {line['count']}")
    scanned[line["split"]].append(rows)
    return faults


def _index_faults(root: Path | str, index: ShardIndex, shards: list[ShardRows], reweighted: bool) -> Iterator[str]:
    """Where the index says something else than the tars."""
    rows = [row for shard in shards for row in shard.rows]
    name = file_in(root, f"{index.split}.index")
    if len(rows) != len(index):
        yield f"{name}: {len(index)} samples, the shards hold {len(rows)}"
        return
    compared = _COPIED if reweighted else (*_COPIED, "gps_weight")
    for column in compared:
        told = np.asarray(getattr(index, column), dtype=np.float64)
        null = {"label": -1.0, "weather": -1.0, "daytime": -1.0, "scene": -1.0}.get(column, np.nan)
        true = np.array([null if row[column] is None else row[column] for row in rows], dtype=np.float64)
        if not np.array_equal(told, true, equal_nan=True):
            wrong = int(np.argmax(~((told == true) | (np.isnan(told) & np.isnan(true)))))
            yield f"{name}: {column} of {index.names([wrong])[0]} is {told[wrong]}, its shard says {true[wrong]}"
    for text in ("id", "group"):
        told_text = getattr(index, text).tolist()
        wrong_rows = [i for i, row in enumerate(rows) if str(row[text] or "") != told_text[i]]
        if wrong_rows:
            yield f"{name}: {text} of row {wrong_rows[0]} differs from its shard"
    for place in _PLACES:
        spans = np.array([row[f"{place}_at"] for row in rows])
        told_spans = np.stack([getattr(index, f"{place}_offset"), getattr(index, f"{place}_size")], axis=1)
        if not np.array_equal(spans, told_spans):
            yield f"{name}: byte ranges of {place} differ from the shards"
    if not (np.isfinite(index.gps_weight).all() and (index.gps_weight >= 0).all()):
        yield f"{name}: a gps_weight is negative or not finite"


def _pixel_faults(root: Path | str, index: ShardIndex) -> Iterator[str]:
    for i in range(len(index)):
        try:
            index.read_views(i)
            index.read_masks(i)
        except (ValueError, OSError) as error:
            yield f"{file_in(root, index.split)}: {index.names([i])[0]} does not decode ({error})"


def _count_faults(root: Path | str, store: Store, manifest: dict[str, Any]) -> Iterator[str]:
    """Where counts do not add up: read = used + rejected, splits against shards, rejected.jsonl against its number."""
    records = manifest.get("records")
    if records is None:  # an index rebuilt from the tars alone knows nothing of what was rejected
        return
    read, used, rejected = records["read"], records["used"], records["rejected"]
    if read != used + rejected:
        yield f"{file_in(root, MANIFEST)}: {read} rows read, but {used} used and {rejected} rejected"
    in_shards = sum(line["count"] for line in manifest["shards"])
    if records["used"] != in_shards:
        yield f"{file_in(root, MANIFEST)}: {records['used']} photos used, the shards hold {in_shards}"
    for split, facts in manifest.get("splits", {}).items():
        count = sum(line["count"] for line in manifest["shards"] if line["split"] == split)
        if facts["photos"] != count:
            yield f"{file_in(root, MANIFEST)}: {facts['photos']} photos in {split}, its shards hold {count}"
    path = file_in(root, "rejected.jsonl")
    try:
        # As bytes: text would also end a line at U+2028 and the like, which JSON leaves within an id as they are.
        lines = [json.loads(line) for line in store.read("rejected.jsonl").splitlines()]
    except OSError:
        yield f"{path}: missing"
        return
    except ValueError:
        yield f"{path}: not JSON lines"
        return
    if len(lines) != records["rejected"]:
        yield f"{path}: {len(lines)} lines, the manifest counts {records['rejected']} rejected"
