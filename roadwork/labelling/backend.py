"""What a segmentation backend takes and gives, and the canvas on which it unites objects.

Every backend sees crops of photos (the whole photo, tiles of it, or the views of a shard) and puts objects on the
photo's canvas; thresholds, sizes, unions and confidence are decided here, once for all backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from roadwork.data.mask_files import NUM_CLASSES, PhotoMasks
from roadwork.data.record import MASK_CLASSES

PROMPTS = dict(
    zip(
        MASK_CLASSES,
        (
            "traffic cone",
            "construction barrier",
            "road work sign",
            "construction worker",
            "construction vehicle",
            "construction equipment",
        ),
        strict=True,
    )
)
"""Class -> the words that a text-prompted model is asked for."""
WORK_SIDE = 1344
"""Longest side of a canvas: a 4032 px photo at a third. Bounds the memory of a photo whatever its size."""
RANDOM_TINY = "random-tiny"
"""Model name that asks for a tiny randomly initialised network of the real classes."""


@dataclass(frozen=True)
class Limits:
    """What counts as an object.

    Attributes:
        score: smallest score of an object, in [0, 1].
        presence: smallest probability that the photo (or tile) shows the concept at all, where a model says so.
        min_object_size: smallest object in pixels of the photo.
        mask: probability above which a pixel belongs to an object.
    """

    score: float = 0.7
    presence: float = 0.7
    min_object_size: int = 100
    mask: float = 0.5


@dataclass(frozen=True)
class Crop:
    """A part of a photo.

    Attributes:
        box: (x0, y0, x1, y1) in whole pixels of the photo.
        rgb: uint8 [h, w, 3], the box's pixels at any resolution.
    """

    box: tuple[int, int, int, int]
    rgb: np.ndarray


@dataclass(frozen=True)
class Photo:
    """What a backend labels; `masks` are real ones that the source itself brings (class bits, uint8 [h, w]), if any,
    and `masks_valid` says for which classes."""

    id: str
    width: int
    height: int
    crops: tuple[Crop, ...]
    masks: np.ndarray | None = None
    masks_valid: tuple[bool, ...] = (True,) * NUM_CLASSES


class Backend(Protocol):
    """One way to make masks."""

    origin: str
    """What made the masks: written into every json."""

    def label(self, photos: Sequence[Photo]) -> list[PhotoMasks | None]:
        """Masks of each photo, in order; None where this backend knows nothing about a photo."""


class Canvas:
    """Class bits of one photo at working resolution; objects are added one by one.

    Memory: one byte per working pixel, at most `WORK_SIDE` squared, and what the caller holds of one crop.
    """

    def __init__(self, width: int, height: int, limits: Limits) -> None:
        if min(width, height) < 1:
            raise ValueError(f"a photo of {width}x{height} pixels; both must be at least 1")
        self.width, self.height, self.limits = width, height, limits
        stride = max(1, math.ceil(max(width, height) / WORK_SIDE))
        self.bits = np.zeros((math.ceil(height / stride), math.ceil(width / stride)), np.uint8)
        self.confidence = [0.0] * NUM_CLASSES
        self.objects = [0] * NUM_CLASSES

    def window(self, box: Sequence[float]) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) of a photo box on the canvas; at least one pixel each way."""
        height, width = self.bits.shape
        left = min(round(box[0] * width / self.width), width - 1)
        top = min(round(box[1] * height / self.height), height - 1)
        right = min(max(round(box[2] * width / self.width), left + 1), width)
        bottom = min(max(round(box[3] * height / self.height), top + 1), height)
        return top, left, bottom, right

    def add(self, class_index: int, box: Sequence[float], mask: np.ndarray, score: float) -> bool:
        """Unite an object that a backend accepted with its class; False where it is too small.

        Args:
            class_index: 0..5.
            box: the crop in which the object was found, pixels of the photo.
            mask: bool [h, w] of the size of the crop's `window`.
            score: in [0, 1]; the largest of a class becomes its confidence.

        Raises:
            ValueError: a mask of another size.
        """
        top, left, bottom, right = self.window(box)
        if mask.shape != (bottom - top, right - left):
            raise ValueError(f"mask of shape {mask.shape} for a window of {(bottom - top, right - left)}")
        photo_pixels = np.count_nonzero(mask) * (self.width * self.height / self.bits.size)
        if not photo_pixels or photo_pixels < self.limits.min_object_size:
            return False
        self.bits[top:bottom, left:right][mask] |= np.uint8(1 << class_index)
        self.confidence[class_index] = max(self.confidence[class_index], float(score))
        self.objects[class_index] += 1
        return True

    def masks(self, origin: str, valid: Sequence[bool] = (True,) * NUM_CLASSES, real: bool = False) -> PhotoMasks:
        """What was united, as it is stored; invalid classes are wiped. real: people drew it."""
        keep = np.uint8(sum(1 << k for k in range(NUM_CLASSES) if valid[k]))
        return PhotoMasks(
            bits=self.bits & keep,
            valid=tuple(bool(v) for v in valid),
            confidence=tuple(min(c, 1.0) if v else 0.0 for c, v in zip(self.confidence, valid, strict=True)),
            origin=origin,
            width=self.width,
            height=self.height,
            objects=tuple(n if v else 0 for n, v in zip(self.objects, valid, strict=True)),
            real=real,
        )
