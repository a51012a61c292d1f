"""One shard: pixels read, decoded, cut into views, encoded and written. Runs in worker processes."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from roadwork.cpu_memory import keep_freed_memory
from roadwork.data.decode import FULL_CHROMA_BELOW, encode_view_planes, encode_views
from roadwork.data.duplicates import photo_hash, thumbnail
from roadwork.data.images import Photo, decode_masks
from roadwork.data.mask_files import SOURCE_MASKS
from roadwork.data.masks import EncodedMasks, MaskFolder
from roadwork.data.plan import BuildOptions, Entry, Rejection, ShardPlan, meta_of
from roadwork.data.record import Rejected
from roadwork.data.scan import ShardRows, pack_rows, scan_shard, unpack_rows
from roadwork.data.shards import Sample, write_shard
from roadwork.data.sources import Ref, Source
from roadwork.data.store import LocalStore, Store, open_store
from roadwork.data.text import embed
from roadwork.data.views import (
    compose_sheet,
    make_mask_views,
    make_view_planes,
    make_views,
    scaled_boxes,
    view_boxes,
)

BUILD = ".build"
"""Folder of what a relaunch needs beside the shards."""

_worker: dict[str, Any] = {}


@dataclasses.dataclass
class ShardResult:
    """What came of one shard plan; kept beside the shard, so that a relaunch need not redo it."""

    fingerprint: str
    shard: dict[str, Any] | None
    rejected: list[dict[str, Any]]
    repairs: dict[str, int]
    repaired: int
    photos: list[dict[str, Any]]
    kept: bool = False


class EncodedPhoto(NamedTuple):
    """What a shard keeps of a photo, the names of its repairs, facts for the audits, and the picture to hash."""

    sample: Sample
    repairs: tuple[str, ...]
    facts: dict[str, Any]
    thumbnail: np.ndarray


def start_worker(source: Source, options: BuildOptions, counter: Any) -> None:
    """Initialise a worker process: one thread each, its own memory kept, no life without the parent."""
    import cv2
    import pyarrow as pa

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed build leaves no processes behind
        if os.getppid() == 1:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    # Arrow's own pool gives row groups back to the kernel, which clears them anew.
    pa.set_memory_pool(pa.system_memory_pool())
    cv2.setNumThreads(1)
    pa.set_cpu_count(1)
    gc.freeze()  # the imported modules need not be searched for garbage again and again
    _worker.update(source=source, options=options, counter=counter)


def work(plan: ShardPlan) -> ShardResult:
    """`build_shard` with what `start_worker` was given."""
    return build_shard(plan, _worker["source"], _worker["options"], _worker["counter"])


def result_name(shard: str) -> str:
    """Where the result of a shard is kept."""
    return f"{BUILD}/{shard}.json"


def rows_name(shard: str) -> str:
    """Where the index rows of a shard that was uploaded are kept."""
    return f"{BUILD}/{shard}.rows"


def rows_of(store: Store, shard: str) -> ShardRows:
    """The index rows of a finished shard: from its tar where that is near, else as they were kept at its upload."""
    if isinstance(store, LocalStore):
        return scan_shard(store.folder / shard)
    return unpack_rows(store.read(rows_name(shard)))


def finished(plan: ShardPlan, store: Store) -> ShardResult | None:
    """The kept result of a shard whose plan and bytes are those of an earlier build, else None.

    A remote shard is told by its plan and size: reading it back would cost as much as building it. Its SHA-256 is
    checked by whoever fetches it.
    """
    from roadwork.data.verify import sha256_of

    try:
        result = ShardResult(**json.loads(store.read(result_name(plan.name))))
    except (OSError, ValueError, TypeError):
        return None
    if result.fingerprint != plan.fingerprint:
        return None
    if result.shard is not None:
        if store.size(plan.name) != result.shard["bytes"]:
            return None
        if isinstance(store, LocalStore) and sha256_of(store.folder / plan.name) != result.shard["sha256"]:
            return None
    result.kept = True
    return result


def build_shard(plan: ShardPlan, source: Source, options: BuildOptions, counter: Any = None) -> ShardResult:
    """Write one shard and its result, or keep both where they are there already."""
    store = open_store(options.out)
    result = finished(plan, store)
    if result is not None:
        _count(counter, len(plan.entries), kept=True)
        return result
    result = ShardResult(plan.fingerprint, None, [], {}, 0, [])
    samples = _samples(plan, source, options, result, counter)
    first = next(samples, None)
    if first is None:
        store.remove(plan.name)
    else:
        store.remove(result_name(plan.name))  # the new bytes must never stand beside the old result
        with store.staged(plan.name) as path:
            result.shard = dataclasses.asdict(write_shard(path, itertools.chain([first], samples)))
            rows = None if isinstance(store, LocalStore) else scan_shard(path)
        if rows is not None:
            store.write(rows_name(plan.name), pack_rows(rows))
    store.write(result_name(plan.name), json.dumps(dataclasses.asdict(result) | {"kept": False}).encode())
    return result


def _count(counter: Any, photos: int, kept: bool = False) -> None:
    """counter: shared [photos done, photos kept]."""
    if counter is not None:
        with counter.get_lock():
            counter[0] += photos
            counter[1] += photos if kept else 0


def _samples(
    plan: ShardPlan, source: Source, options: BuildOptions, result: ShardResult, counter: Any
) -> Iterator[Sample]:
    entries = {entry.ref: entry for entry in plan.entries}
    folder = MaskFolder(options.masks) if options.masks else None
    texts = _texts(plan, options)
    repairs: Counter[str] = Counter()
    thumbnails: list[np.ndarray] = []
    for ref, image, masks in source.load([entry.ref for entry in plan.entries]):
        entry = entries[ref]
        try:
            photo = encode_photo(entry, image, masks, folder, options)
        except Rejected as error:
            result.rejected.append(dataclasses.asdict(Rejection(entry.record.id, error.reason, entry.split)))
        else:
            photo.sample.meta.update(texts.get(ref, {}))
            repairs.update(photo.repairs)
            result.repaired += bool(photo.repairs)
            result.photos.append(photo.facts)
            thumbnails.append(photo.thumbnail)
            yield photo.sample
        _count(counter, 1)
    # Together, since between two photos imagehash's code has left the processor's cache.
    for facts, small in zip(result.photos, thumbnails, strict=True):
        facts["hash"] = photo_hash(small)
    result.repairs = dict(sorted(repairs.items()))


def _texts(plan: ShardPlan, options: BuildOptions) -> dict[Ref, dict[str, Any]]:
    """What the JSON of each photo holds of its description's vector; nothing without an encoder."""
    if not options.text_encoder:
        return {}
    vectors = embed(options.text_encoder, [entry.record.description for entry in plan.entries])
    return {entry.ref: {"text": vector} for entry, vector in zip(plan.entries, vectors, strict=True)}


def encode_photo(
    entry: Entry, image: bytes, masks: bytes | None, folder: MaskFolder | None, options: BuildOptions
) -> EncodedPhoto:
    """One photo of a shard. Raises Rejected where it cannot be decoded."""
    header = Photo(image)
    width, height = header.width, header.height
    boxes = view_boxes(width, height, options.view_size, options.max_views)
    rgb, notes = header.decode(shrink_for(boxes, options.view_size))
    sheet, whole = encode_sheet(rgb, scaled_boxes(boxes, (width, height), rgb.shape), options)
    meta = meta_of(entry) | {"width": width, "height": height}
    bits: np.ndarray | None = None
    try:
        found = _masks_of(entry, masks, folder)
        if found is not None:
            plane = decode_masks(found.png, width, height)
            bits = mask_views(plane, scaled_boxes(boxes, (width, height), plane.shape), options.view_size)
            meta |= {"masks_valid": found.valid, "masks_confidence": found.confidence}
            meta |= {"masks_origin": found.origin, "masks_real": found.real}
    except Rejected as error:  # the photo is used without masks
        notes += (error.reason.partition(":")[0],)
    facts = {
        "id": entry.record.id,
        "split": entry.split,
        "group": entry.group,
        "label": entry.record.label,
        "size": f"{width}x{height}",
        "format": image[:4].hex(),
        "masks": bits is not None,
    }
    sample = Sample(entry.key, sheet, boxes, meta, bits, options.view_size)
    return EncodedPhoto(sample, entry.record.repairs + notes, facts, thumbnail(whole))


def encode_sheet(rgb: np.ndarray, boxes: np.ndarray, options: BuildOptions) -> tuple[bytes, np.ndarray]:
    """(JPEG of the sheet of views, the first view: RGB or its luma). boxes [V, 4] in pixels of `rgb`."""
    if options.view_size < FULL_CHROMA_BELOW:
        views = make_views(rgb, boxes, options.view_size)
        return encode_views(compose_sheet(views), options.quality), views[0]
    y, cb, cr = make_view_planes(rgb, boxes, options.view_size)
    return encode_view_planes(compose_sheet(y), compose_sheet(cb), compose_sheet(cr), options.quality), y[0]


def _masks_of(entry: Entry, masks: bytes | None, folder: MaskFolder | None) -> EncodedMasks | None:
    """Masks that were asked for by name (the folder's) before the source's exact ones."""
    if folder is not None:
        found = folder.get(entry.record.id)
        if found is not None:
            if entry.record.extra.get("ambiguous_id"):
                raise Rejected("masks_ambiguous_id: two published splits have a photo of this id")
            return found
    return EncodedMasks(masks, [True] * 6, [1.0] * 6, SOURCE_MASKS, True) if masks else None


def shrink_for(boxes: np.ndarray, view_size: int) -> int:
    """Largest of 8, 4, 2, 1 by which a photo may shrink so that no view has to be enlarged for it.

    boxes: [V, 4] (x0, y0, x1, y1) in pixels of the photo; view_size: pixels.
    """
    side = float((boxes[:, 2:] - boxes[:, :2]).min())
    return next((factor for factor in (8, 4, 2) if side / factor >= view_size), 1)


def mask_views(bits: np.ndarray, boxes: np.ndarray, view_size: int) -> np.ndarray:
    """As `make_mask_views`, box by box: most crops hold few of the classes, and only those cost anything.

    bits uint8 [H, W] -> uint8 [V, S/4, S/4]; boxes [V, 4] in pixels of `bits`, cut to whole ones.
    """
    made = []
    for x0, y0, x1, y1 in boxes.astype(int):
        whole = np.array([[0, 0, x1 - x0, y1 - y0]], dtype=np.float32)
        made.append(make_mask_views(np.ascontiguousarray(bits[y0:y1, x0:x1]), whole, view_size)[0])
    return np.stack(made)
