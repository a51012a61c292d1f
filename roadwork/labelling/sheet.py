"""A contact sheet: photos with their masks laid over."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from roadwork.data.mask_files import PhotoMasks, shrink_bits
from roadwork.data.record import MASK_CLASSES
from roadwork.labelling.backend import Photo

CELL = (320, 200)
"""Width and height of one photo's cell."""
COLUMNS = 4
BAR = 22
COLOURS = np.array(
    [(255, 120, 0), (230, 30, 90), (255, 230, 0), (0, 200, 80), (0, 140, 255), (170, 80, 255)], dtype=np.uint8
)
"""RGB of each class."""


def contact_sheet(pictures: Sequence[tuple[Photo, PhotoMasks]]) -> bytes:
    """PNG of 1 to a few dozen photos: whole photo, masks in class colours, id and classes below, a legend on top.

    ValueError where OpenCV does not encode it.
    """
    cells = [_cell(photo, masks) for photo, masks in pictures]
    blank = np.full((CELL[1] + BAR, CELL[0], 3), 255, np.uint8)
    cells += [blank] * (-len(cells) % COLUMNS)
    rows = [np.hstack(cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
    sheet = np.vstack([_legend(rows[0].shape[1]), *rows])
    done, png = cv2.imencode(".png", sheet[..., ::-1])
    if not done:
        raise ValueError(f"could not encode a sheet of shape {sheet.shape}")
    return png.tobytes()


def overlay(rgb: np.ndarray, bits: np.ndarray, strength: float = 0.55) -> np.ndarray:
    """uint8 [h, w, 3] with class bits [h, w] in their colours; a pixel of several classes mixes them."""
    mixed = rgb.astype(np.float32)
    planes = (bits[..., None] >> np.arange(len(COLOURS)) & 1).astype(np.float32)
    count = planes.sum(-1, keepdims=True)
    colour = planes @ COLOURS.astype(np.float32) / np.maximum(count, 1)
    return np.where(count > 0, (1 - strength) * mixed + strength * colour, mixed).astype(np.uint8)


def _cell(photo: Photo, masks: PhotoMasks) -> np.ndarray:
    scale = min(CELL[0] / photo.width, CELL[1] / photo.height)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    rgb = cv2.resize(photo.crops[0].rgb, size, interpolation=cv2.INTER_AREA)
    bits = shrink_bits(masks.bits, size[1], size[0], share=0.02)  # a far cone still shows
    cell = np.full((CELL[1] + BAR, CELL[0], 3), 255, np.uint8)
    cell[: size[1], : size[0]] = overlay(rgb, bits)
    shown = " ".join(f"{n} {c}" for n, c in zip(MASK_CLASSES, masks.objects, strict=True) if c) or "nothing found"
    _write(cell, f"{photo.id[:16]}: {shown}", (3, CELL[1] + 15))
    return cell


def _legend(width: int) -> np.ndarray:
    bar = np.full((BAR, width, 3), 255, np.uint8)
    for k, name in enumerate(MASK_CLASSES):
        left = 4 + k * 110
        bar[5:17, left : left + 12] = COLOURS[k]
        _write(bar, name, (left + 16, 15))
    return bar


def _write(picture: np.ndarray, text: str, at: tuple[int, int]) -> None:
    cv2.putText(
        picture, text.encode("ascii", "replace").decode(), at, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA
    )
