"""Writing shards: plain WebDataset tars whose bytes depend on nothing but the samples."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import socket
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from roadwork.data.decode import NUM_CLASSES, decode_masks, encode_masks, encode_views
from roadwork.data.views import MASK_STRIDE, MAX_VIEWS, check_view_size, compose_sheet
from roadwork.errors import UserError

SCHEMA_VERSION = 1
"""Raised whenever an older reader would misread a newer shard or index."""
SPLITS = ("train", "val", "test", "predict")
VIEWS, META, MASKS = ".views.jpg", ".json", ".masks.png"
"""The members of one sample, in this order within a shard."""
META_KEYS = (
    "label", "latitude", "longitude", "gps_weight", "group", "width", "height", "weather", "daytime", "scene",
)  # fmt: skip
"""What every sample's JSON must say (null where unknown)."""
_SHARD_NAME = re.compile(r"(train|val|test|predict)-(\d{6,})\.tar")
_KEY = re.compile(r"[^./\\\x00-\x1f]{1,90}")


@dataclass
class Sample:
    """One photo as it goes into a shard.

    views: uint8 [V, S, S, 3], or the bytes of an already encoded sheet (then `view_size` must be given).
    boxes: [V, 4] view boxes (x0, y0, x1, y1) in pixels of the photo.
    masks: uint8 [V, S/4, S/4] of class bits, encoded PNG bytes, or None. With masks, `meta` holds `masks_valid`
        (6 booleans) and `masks_confidence` (6 numbers).
    meta: the JSON: at least META_KEYS; `id` where the photo's own id differs from the key.
    """

    key: str
    views: npt.NDArray[np.uint8] | bytes
    boxes: npt.NDArray[np.float32]
    meta: dict[str, Any]
    masks: npt.NDArray[np.uint8] | bytes | None = None
    view_size: int = field(default=0)


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says about one shard."""

    name: str
    split: str
    count: int
    bytes: int
    sha256: str


def shard_name(split: str, number: int) -> str:
    """`train-000000.tar`; UserError for splits other than SPLITS."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    return f"{split}-{number:06d}.tar"


def parse_shard_name(name: str) -> tuple[str, int]:
    """(split, number) of a shard's file name; UserError for any other name."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is not a shard's name; shards are called like {shard_name('train', 0)}")
    return match[1], int(match[2])


def write_shard(path: str | os.PathLike[str], samples: Iterable[Sample]) -> ShardInfo:
    """Write one shard: deterministic bytes, under a temporary name, fsynced, renamed.

    Args:
        path: `DIR/{split}-{number:06d}.tar`.
        samples: in the order in which they are to lie in the shard.

    Returns:
        Name, split, count, bytes and SHA-256 of what was written.

    Raises:
        ValueError: a sample with a bad key, bad shapes or missing metadata; nothing is left behind then.
    """
    target = Path(path)
    split, _ = parse_shard_name(target.name)
    seen: set[str] = set()
    with atomic_file(target) as raw:
        out = _HashingWriter(raw)
        for sample in samples:
            if sample.key in seen:
                raise ValueError(f"key {sample.key!r} twice in {target.name}; keys must be unique")
            seen.add(sample.key)
            for name, data in _members(sample):
                _add(out, name, data)
        out.write(bytes(2 * tarfile.BLOCKSIZE))
        out.write(bytes(-out.size % tarfile.RECORDSIZE))
        if not seen:
            raise ValueError(f"{target.name} would be empty; write a shard only for at least one sample")
    return ShardInfo(target.name, split, len(seen), out.size, out.digest.hexdigest())


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each member of a sample, checked."""
    key, boxes = sample.key, np.asarray(sample.boxes, dtype=np.float32)
    if not _KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: 1 to 90 characters without dots, slashes and control characters are allowed")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not 1 <= len(boxes) <= MAX_VIEWS:
        raise ValueError(f"{key}: boxes are [V, 4] with 1 <= V <= {MAX_VIEWS}; got {boxes.shape}")
    missing = [name for name in META_KEYS if name not in sample.meta]
    if missing:
        raise ValueError(f"{key}: the metadata lack {', '.join(missing)} (give None where a value is unknown)")
    views, masks, size = sample.views, sample.masks, sample.view_size
    if not isinstance(views, bytes):
        size = views.shape[1]
        if views.dtype != np.uint8 or views.shape != (len(boxes), size, size, 3):
            raise ValueError(f"{key}: views are uint8 [{len(boxes)}, S, S, 3]; got {views.dtype} {views.shape}")
        views = encode_views(compose_sheet(views))
    check_view_size(size)
    meta = dict(sample.meta, views=boxes.astype(float).tolist(), view_size=size)
    if masks is not None:
        side = size // MASK_STRIDE
        for name in ("masks_valid", "masks_confidence"):
            if len(meta.get(name, ())) != NUM_CLASSES:
                raise ValueError(f"{key}: with masks, the metadata need {name} of {NUM_CLASSES} entries")
        if not isinstance(masks, bytes):
            if masks.dtype != np.uint8 or masks.shape != (len(boxes), side, side):
                raise ValueError(
                    f"{key}: masks are uint8 [{len(boxes)}, {side}, {side}]; got {masks.dtype} {masks.shape}"
                )
            masks = encode_masks(compose_sheet(masks))
        else:
            decode_masks(masks, len(boxes), side)
    yield key + VIEWS, views
    yield key + META, json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=None).encode()
    if masks is not None:
        yield key + MASKS, masks


def _add(out: _HashingWriter, name: str, data: bytes) -> None:
    """A tar's member. `tarfile.addfile` would copy every photo four times on its way."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), 0o644, 0
    header.uid = header.gid = 0
    header.uname = header.gname = ""
    out.write(header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
    out.write(data)
    out.write(bytes(-len(data) % tarfile.BLOCKSIZE))


class _HashingWriter:
    """A file that counts and hashes what goes through it, and whose bytes are on their way to the disk early."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.size, self.digest = raw, 0, hashlib.sha256()
        self._handed = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        written = self.raw.write(data)
        if self.size - self._handed >= HAND_OVER:
            self.raw.flush()
            _begin_writing(self.raw.fileno(), self._handed, self.size - self._handed)
            self._handed = self.size
        return written


HAND_OVER = 4 << 20
"""Bytes after which the kernel is asked to begin writing: left to the end, the fsync of a whole shard keeps a core idle."""
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def _begin_writing(descriptor: int, start: int, size: int) -> None:
    """Begin writing a range to the disk without waiting: a hint, which some systems and file systems do not know."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name whole and on disk, or not at all."""
    # Containers of several machines may have equal process numbers, and a folder in common.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_samples(path: str | os.PathLike[str]) -> Iterator[Sample]:
    """The samples of a shard with their images still encoded: to rewrite a shard with other metadata or masks."""
    fields: dict[str, bytes] = {}
    key = ""

    def sample() -> Sample:
        meta = json.loads(fields[META])
        boxes = np.asarray(meta.pop("views"), dtype=np.float32)
        return Sample(key, fields[VIEWS], boxes, meta, fields.get(MASKS), meta.pop("view_size"))

    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        for member in tar:
            stem, dot, rest = member.name.partition(".")
            if stem != key and fields:
                yield sample()
                fields = {}
            key = stem
            fields[dot + rest] = cast(BinaryIO, tar.extractfile(member)).read()
    if fields:
        yield sample()
