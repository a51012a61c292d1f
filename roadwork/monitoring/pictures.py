"""Small pictures for a person: mask overlays and grids, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MASK_COLOURS = ((255, 128, 0), (214, 39, 40), (255, 221, 51), (44, 160, 44), (31, 119, 180), (148, 103, 189))
"""RGB of cone, barrier, sign, worker, vehicle, equipment."""


def to_uint8(images: Any) -> npt.NDArray[np.uint8]:
    """Images [..., 3, H, W], uint8 or float in [0, 1], tensor or array -> uint8 array of the same shape."""
    if hasattr(images, "detach"):
        images = images.detach().float().cpu() if images.is_floating_point() else images.detach().cpu()
    array = np.asarray(images)
    if array.ndim < 3 or array.shape[-3] != 3:
        raise ValueError(f"pictures must have shape [..., 3, H, W], got {array.shape}")
    if array.dtype == np.uint8:
        return array
    return (np.nan_to_num(array.astype(np.float32)).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def overlay(images: Any, masks: Any, opacity: float = 0.5) -> npt.NDArray[np.uint8]:
    """Images [N, 3, H, W] with masks [N, 6, h, w] (values in [0, 1]) laid over them, class by class in MASK_COLOURS."""
    pictures: Any = to_uint8(images).astype(np.float32)
    if hasattr(masks, "detach"):
        masks = masks.detach().float().cpu()
    layers: Any = np.asarray(masks, dtype=np.float32)
    if layers.ndim != 4 or layers.shape[:2] != (len(pictures), len(MASK_COLOURS)):
        raise ValueError(f"masks must have shape [{len(pictures)}, {len(MASK_COLOURS)}, h, w], got {layers.shape}")
    height, width = pictures.shape[-2:]
    rows = np.arange(height) * layers.shape[2] // height
    columns = np.arange(width) * layers.shape[3] // width
    layers = layers[:, :, rows][:, :, :, columns].clip(0, 1) * opacity
    for k, colour in enumerate(MASK_COLOURS):
        cover = layers[:, k : k + 1]
        pictures = pictures * (1 - cover) + np.asarray(colour, dtype=np.float32)[None, :, None, None] * cover
    laid: npt.NDArray[np.uint8] = (pictures + 0.5).astype(np.uint8)
    return laid


def grid(images: Any, columns: int = 4, gap: int = 2) -> npt.NDArray[np.uint8]:
    """Images [N, 3, H, W] side by side in rows of `columns`, on white: uint8 [3, rows * (H + gap), columns * (W +
    gap)].
    """
    pictures = to_uint8(images)
    n, _, height, width = pictures.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    sheet = np.full((3, max(1, rows) * (height + gap), columns * (width + gap)), 255, dtype=np.uint8)
    for i in range(n):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = pictures[i]
    return sheet
