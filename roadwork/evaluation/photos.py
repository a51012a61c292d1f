"""Photos put together again from the views in the shards, for people and for the challenge."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

DARKEST = 0.35
"""Brightness of a place that no view with attention shows."""


def stitched(index: Any, row: int, width: int = 1280, views: Any = None) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] in the photo's own proportions, at most `width` wide and never larger than the photo was.

    The whole-photo view first, then the finer views over it, each at its box. views: uint8 [V, 3, S, S] of the photo
    where they have been read already. ValueError where the sample is damaged.
    """
    views = np.asarray(index.read_views(int(row)) if views is None else views).transpose(0, 2, 3, 1)
    full_width, full_height = int(index.width[row]), int(index.height[row])
    if full_width <= 0 or full_height <= 0:
        full_height, full_width = views.shape[1:3]
    wide = min(width, full_width)
    high = max(1, round(wide * full_height / full_width))
    canvas = np.zeros((high, wide, 3), dtype=np.uint8)
    boxes = np.asarray(index.boxes(int(row)), dtype=np.float64) * np.asarray([wide, high, wide, high])
    for view, box in zip(views, np.round(boxes).astype(int), strict=True):
        x0, y0, x1, y1 = (int(edge) for edge in box)
        if x1 > x0 and y1 > y0:
            shrinks = x1 - x0 < view.shape[1]
            form = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            canvas[y0:y1, x0:x1] = cv2.resize(np.ascontiguousarray(view), (x1 - x0, y1 - y0), interpolation=form)
    return canvas


def looked_at(index: Any, row: int, attention: Sequence[float], width: int = 480) -> npt.NDArray[np.uint8]:
    """`stitched`, uint8 [H, W, 3], darker where the network looked less.

    attention: weight of each view of the photo, 0 for a pruned one. A place is as bright as the best view that shows
    it; the whole-photo view says nothing about a place. Without attention on any other view: the photo as it is.
    """
    canvas = stitched(index, row, width)
    if len(attention) < 2 or max(attention[1:]) <= 0:
        return canvas
    high, wide = canvas.shape[:2]
    boxes = np.asarray(index.boxes(int(row)), dtype=np.float64) * np.asarray([wide, high, wide, high])
    weight = np.zeros((high, wide, 1), dtype=np.float32)
    for share, box in zip(attention[1:], np.round(boxes[1:]).astype(int), strict=False):
        x0, y0, x1, y1 = box
        weight[y0:y1, x0:x1] = np.maximum(weight[y0:y1, x0:x1], share)
    darker: npt.NDArray[np.uint8] = (canvas * (DARKEST + (1 - DARKEST) * weight / weight.max())).astype(np.uint8)
    return darker


def attention_words(attention: Sequence[float], most: int = 3) -> str:
    """`view 5 (41 %), the whole photo (22 %) of 8 views`; empty for one view, which has all attention anyway."""
    if len(attention) < 2:
        return ""
    best = sorted(range(len(attention)), key=lambda v: -attention[v])[:most]
    told = [f"{f'view {v}' if v else 'the whole photo'} ({attention[v]:.0%})" for v in best if attention[v] > 0]
    return f"{', '.join(told)} of {len(attention)} views"


def jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] as JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def worst_photos(index: Any, analysis: Mapping[str, Any]) -> dict[str, npt.NDArray[np.uint8]]:
    """Photos, uint8 [H, W, 3] by id, of the worst errors that `errors.analyse` names, with the views that attention
    chose where it is known; a photo that cannot be read is left out.
    """
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for kind in analysis["worst"].values():
        for error in kind:
            try:
                found[error["id"]] = looked_at(index, error["row"], error.get("attention", ()))
            except (OSError, ValueError):
                continue
    return found


class Photos(Sequence[Any]):
    """Photos of some rows of an index, stitched when asked for (the last 64 are kept); a damaged one is black."""

    def __init__(self, index: Any, rows: Any, width: int = 1280) -> None:
        self.rows = np.asarray(rows, dtype=np.int64)
        self._read = functools.lru_cache(maxsize=64)(lambda row: stitched(index, row, width))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        try:
            return self._read(int(self.rows[i]))
        except (OSError, ValueError):
            return np.zeros((224, 224, 3), dtype=np.uint8)
