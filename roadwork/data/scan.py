"""One pass over a shard: every sample's byte ranges and metadata, from the tar alone."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from roadwork.data.shards import MASKS, META, META_KEYS, VIEWS, ShardInfo, parse_shard_name
from roadwork.errors import UserError


@dataclass(frozen=True)
class ShardRows:
    """A shard's line in the manifest, and one row per sample for the index."""

    info: ShardInfo
    view_size: int
    rows: list[dict[str, Any]]


def scan_shard(path: str | os.PathLike[str], told: str | os.PathLike[str] | None = None) -> ShardRows:
    """Read a whole shard once: SHA-256, byte ranges, CRC-32 of the sheets, metadata.

    told: what errors call the file, where `path` is a fetched copy.

    Raises:
        UserError: a truncated or foreign file, a sample without its sheet or JSON, or several view sizes; names the
            file and the key.
    """
    path, file = Path(path), Path(path) if told is None else told
    split, _ = parse_shard_name(path.name)
    rows: list[dict[str, Any]] = []
    try:
        with open(path, "rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
            size = raw.tell()
            raw.seek(0)
            for key, members in _groups(raw, file, size):
                rows.append(_row(file, key, members, raw))
    except FileNotFoundError as error:
        raise UserError(f"shard {file} is missing; build it again with `python -m shards.build`") from error
    sizes = {row["view_size"] for row in rows}
    if len(sizes) != 1:
        raise UserError(f"shard {file} holds views of {sorted(sizes)} px; one size is allowed: build it again")
    return ShardRows(ShardInfo(path.name, split, len(rows), size, digest), sizes.pop(), rows)


def pack_rows(rows: ShardRows) -> bytes:
    """What `scan_shard` found, as JSON: so that a shard that was uploaded need not be fetched again for its index."""
    lines = [{**row, "boxes": row["boxes"].tolist()} for row in rows.rows]
    return json.dumps({"info": vars(rows.info), "view_size": rows.view_size, "rows": lines}).encode()


def unpack_rows(data: bytes) -> ShardRows:
    """The inverse of `pack_rows`."""
    stored = json.loads(data)
    rows = [{**row, "boxes": np.asarray(row["boxes"], dtype=np.float32)} for row in stored["rows"]]
    return ShardRows(ShardInfo(**stored["info"]), stored["view_size"], rows)


def _groups(raw: BinaryIO, file: str | os.PathLike[str], size: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, member suffix -> (offset, size)) of each sample in order."""
    key, members, end = "", dict[str, tuple[int, int]](), 0
    try:
        with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8") as tar:
            for member in tar:
                stem, dot, suffix = member.name.partition(".")
                if stem != key and members:
                    yield key, members
                    members = {}
                key = stem
                members[dot + suffix] = (member.offset_data, member.size)
                end = member.offset_data + member.size
    except tarfile.TarError as error:
        raise UserError(
            f"shard {file} is not a whole tar ({error}); build it again with `python -m shards.build`"
        ) from error
    # A cut in the middle of the last member or of the two closing zero blocks.
    if size < (end + 511) // 512 * 512 + 1024:
        raise UserError(f"shard {file} is truncated at {size} bytes; build it again with `python -m shards.build`")
    if members:
        yield key, members


def _row(file: str | os.PathLike[str], key: str, members: dict[str, tuple[int, int]], raw: BinaryIO) -> dict[str, Any]:
    for suffix in (VIEWS, META):
        if suffix not in members:
            raise UserError(f"shard {file}: sample {key} has no {key}{suffix}; build the shard again")
    if unknown := set(members) - {VIEWS, META, MASKS}:
        raise UserError(f"shard {file}: sample {key} has an unknown member {key}{min(unknown)}; build the shard again")
    try:
        meta = json.loads(os.pread(raw.fileno(), members[META][1], members[META][0]))
        row = {name: meta[name] for name in (*META_KEYS, "view_size")}
        boxes = np.asarray(meta["views"], dtype=np.float32) / np.asarray([meta["width"], meta["height"]] * 2)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"shard {file}: {key}{META} is not this version's ({error}); build the shard again") from error
    masked = MASKS in members
    row.update(
        id=str(meta.get("id") or key),
        city=str(meta.get("city") or ""),
        has_text="text" in meta,
        boxes=boxes.astype(np.float32),
        masks_valid=[bool(v) for v in meta["masks_valid"]] if masked else [False] * 6,
        views_at=members[VIEWS],
        meta_at=members[META],
        masks_at=members.get(MASKS, (0, 0)),
        crc=zlib.crc32(os.pread(raw.fileno(), members[VIEWS][1], members[VIEWS][0])),
    )
    return row
