"""Which parts of a photo a model looks at."""

from __future__ import annotations

import math

import numpy as np

from roadwork.labelling.backend import Crop, Photo

TILE_SIDE = 1008
"""Pixels of the photo per tile: SAM 3's input, so that a tile is seen pixel by pixel."""
TILE_OVERLAP = 0.15
"""Smallest share of a tile that its neighbour sees as well, so that a small object is whole in one of them."""


def whole_photo(photo_id: str, rgb: np.ndarray, masks: np.ndarray | None = None) -> Photo:
    """A photo that is looked at in one piece; `rgb` uint8 [H, W, 3]."""
    height, width = rgb.shape[:2]
    return Photo(photo_id, width, height, (Crop((0, 0, width, height), rgb),), masks)


def tiled_photo(photo_id: str, rgb: np.ndarray, masks: np.ndarray | None = None, side: int = TILE_SIDE) -> Photo:
    """A photo that is looked at whole (for large objects) and in overlapping tiles (for small ones).

    rgb: uint8 [H, W, 3]; masks: class bits uint8 [h, w]; side: of a tile, pixels.
    """
    height, width = rgb.shape[:2]
    boxes = [(0, 0, width, height), *tile_boxes(width, height, side)]
    crops = tuple(Crop((x0, y0, x1, y1), rgb[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes)
    return Photo(photo_id, width, height, crops, masks)


def tile_boxes(width: int, height: int, side: int = TILE_SIDE) -> list[tuple[int, int, int, int]]:
    """Square tiles of `side` pixels (of the short side, where that is less) that cover the photo and overlap.

    Empty where the photo is no larger than one tile: the whole photo is then that tile.
    """
    if max(width, height) <= side:
        return []
    side = min(side, width, height)
    lefts, tops = _offsets(width, side), _offsets(height, side)
    return [(x, y, x + side, y + side) for y in tops for x in lefts]


def _offsets(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    count = math.ceil((length - side) / (side * (1 - TILE_OVERLAP))) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]
