"""COCO's mask formats: run lengths (plain or compressed) and polygons.

Run lengths go down the columns, starting with a run of zeros (cocodataset/cocoapi, common/maskApi.c). The compressed
string holds each count in 5-bit groups, low first, as characters from 48 on; from the fourth count on, the difference
to the count two before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

MAX_PIXELS = 200_000_000


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """bool [height, width] of a COCO `segmentation`: an RLE object or a list of polygons.

    Raises:
        ValueError: runs that do not fill the mask, another size than the photo's, or no such format.
    """
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"a mask of {width}x{height} pixels; allowed: 1 to {MAX_PIXELS} pixels")
    try:
        return _decode(segmentation, height, width)
    except (TypeError, OverflowError) as error:  # null, text or a huge number where a number belongs
        raise ValueError(f"segmentation holds what is no number of pixels ({error})") from error


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, Mapping):
        size = [int(v) for v in segmentation.get("size", ())]
        if size != [height, width]:
            raise ValueError(f"RLE of size {size} for a photo of size {[height, width]} (height, width)")
        counts = segmentation.get("counts")
        if isinstance(counts, str | bytes):
            counts = decompress_counts(counts)
        return decode_counts(counts, height, width)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes):
        return _fill_polygons(segmentation, height, width)
    raise ValueError(f"segmentation is {type(segmentation).__name__}; needed: an RLE object or a list of polygons")


def decode_counts(counts: Any, height: int, width: int) -> np.ndarray:
    """bool [height, width] of plain run lengths; ValueError for others than fill it."""
    if not isinstance(counts, Sequence | np.ndarray) or isinstance(counts, str | bytes):
        raise ValueError(f"RLE counts are {type(counts).__name__}; needed: a list of numbers or a string")
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"RLE counts add up to {int(runs.sum())}; the mask has {height * width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def decompress_counts(text: str | bytes) -> list[int]:
    """Run lengths in pixels of COCO's compressed string; ValueError where it is none or ends within a number."""
    data = text.encode("latin-1", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for byte in data:
        group = byte - 48
        if not 0 <= group < 64:
            raise ValueError(f"compressed RLE holds the byte {byte}; allowed: 48 to 111")
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed RLE ends within a number")
    return counts


def _fill_polygons(polygons: Sequence[Any], height: int, width: int) -> np.ndarray:
    canvas = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            raise ValueError("a polygon is a flat list of at least three x, y pairs")
        cv2.fillPoly(canvas, [np.rint(points.reshape(-1, 2) - 0.5).astype(np.int32)], 1)
    return canvas.astype(bool)
