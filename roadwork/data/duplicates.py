"""Photos that look the same: perceptual hashes, and pairs of them within a few bits."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cv2
import imagehash
import numpy as np
from PIL import Image

from roadwork.data.images import decode_photo
from roadwork.data.record import Rejected
from roadwork.data.sources import Ref, Source

MAX_BITS = 4
"""Two photos whose 64-bit hashes differ in at most so many bits count as near-duplicates."""

SIDE = 32
"""Side of the picture whose DCT imagehash takes; an area average to it spares imagehash a slower filter of its own."""

_worker: dict[str, Source] = {}


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Luma uint8 [32, 32] of uint8 [H, W, 3] or [H, W]: all that `photo_hash` looks at. Smaller pictures stay as they are."""
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if min(grey.shape) > SIDE:
        grey = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(grey, dtype=np.uint8)


def photo_hash(image: np.ndarray) -> str:
    """64-bit perceptual hash (DCT, imagehash.phash) of uint8 [H, W, 3], or of its luma [H, W], as 16 hex digits."""
    return str(imagehash.phash(Image.fromarray(thumbnail(image))))


def near_pairs(hashes: Sequence[str], max_bits: int = MAX_BITS) -> Iterator[tuple[int, int]]:
    """All pairs i < j whose hashes differ in at most max_bits bits, each told once and none of them kept.

    Exact: of max_bits + 1 bands at least one is equal in such a pair (pigeonhole), so only photos that share a
    band are compared, and a pair is told in the first band that it shares. A flat photo (hash 0 or all ones) matches
    nothing: it says nothing about what is seen.
    """
    values = np.array([int(h, 16) for h in hashes], dtype=np.uint64)
    telling = (values != 0) & (values != np.uint64(0xFFFFFFFFFFFFFFFF))
    edges = [64 * k // (max_bits + 1) for k in range(max_bits + 2)]
    bands = [np.uint64((1 << high) - (1 << low)) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    for number, band in enumerate(bands):
        buckets: dict[int, list[int]] = defaultdict(list)
        for i in np.flatnonzero(telling):
            buckets[int(values[i] & band)].append(int(i))
        for members in buckets.values():
            rows = np.array(members)
            for at in range(len(rows) - 1):
                differing = values[rows[at + 1 :]] ^ values[rows[at]]
                near = np.bitwise_count(differing) <= max_bits
                for earlier in bands[:number]:
                    near &= differing & earlier != 0
                for other in rows[at + 1 :][near]:
                    yield int(rows[at]), int(other)


def merge_groups_of_duplicates(
    source: Source, refs: Sequence[Ref], groups: Sequence[str], processes: int = 0
) -> list[str]:
    """Groups that hold near-duplicates of each other become one (named after the first in order of name)."""
    hashes = hash_photos(source, refs, processes)
    known = [i for i, h in enumerate(hashes) if h]
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    for i, j in near_pairs([hashes[i] for i in known]):
        a, b = sorted((root(groups[known[i]]), root(groups[known[j]])))
        parent[b] = a
    return [root(group) for group in groups]


def hash_photos(source: Source, refs: Sequence[Ref], processes: int = 0) -> list[str]:
    """Hash of each row's photo; empty where it does not decode."""
    chunks = [refs[i : i + 64] for i in range(0, len(refs), 64)]
    workers = min(processes or os.cpu_count() or 1, len(chunks))
    if workers <= 1:
        return [h for chunk in chunks for h in _hash_chunk(source, chunk)]
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (source,)) as pool:
        return [h for part in pool.map(_hash_in_worker, chunks) for h in part]


def _start_worker(source: Source) -> None:
    """A source may list millions of rows: each worker is sent it once."""
    _worker["source"] = source


def _hash_in_worker(refs: Sequence[Ref]) -> list[str]:
    return _hash_chunk(_worker["source"], refs)


def _hash_chunk(source: Source, refs: Sequence[Ref]) -> list[str]:
    hashes = {}
    for ref, image, _ in source.load(refs):
        try:
            hashes[ref] = photo_hash(decode_photo(image)[0])
        except Rejected:
            hashes[ref] = ""
    return [hashes[ref] for ref in refs]
