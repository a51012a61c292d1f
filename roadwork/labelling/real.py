"""Masks that people drew: COCO files as CMU's ROADWork publishes them, and masks that a source brings itself."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from roadwork.data.mask_files import NUM_CLASSES, SOURCE_MASKS, PhotoMasks, shrink_bits
from roadwork.data.record import MASK_CLASSES
from roadwork.errors import UserError
from roadwork.labelling.backend import Backend, Canvas, Limits, Photo
from roadwork.labelling.rle import decode_segmentation

log = logging.getLogger(__name__)

CATEGORIES = {
    "cone": "cone",
    "tubular marker": "cone",
    "drum": "cone",
    "barrier": "barrier",
    "barricade": "barrier",
    "fence": "barrier",
    "vertical panel": "barrier",
    "temporary traffic control sign": "sign",
    "temporary traffic control message board": "sign",
    "arrow board": "sign",
    "ttc sign": "sign",
    "ttc message board": "sign",
    "worker": "worker",
    "work vehicle": "vehicle",
    "work equipment": "equipment",
    "construction equipment": "equipment",
    "construction worker": "worker",
    "construction vehicle": "vehicle",
    "traffic cone": "cone",
    "construction barrier": "barrier",
    "road work sign": "sign",
} | {name: name for name in MASK_CLASSES}
"""ROADWork's categories (arXiv 2406.07661) and our own words -> our six classes; drums and tubular markers guide
traffic as cones do. Police officers and vehicles, and road surfaces, are none of the six. A text behind a colon (the
face of a sign) is ignored."""


def class_of(category: str) -> int | None:
    """Our class of a category's name, or None where it is none of the six."""
    name = " ".join(category.split(":")[0].lower().replace("_", " ").replace("-", " ").split())
    known = CATEGORIES.get(name)
    return None if known is None else MASK_CLASSES.index(known)


class CocoMasks:
    """The annotations of one COCO file, found by a photo's id or file name.

    A class is valid where the file has a category of it: a photo of the file without its annotation has an EMPTY mask.

    Args:
        path: COCO JSON with `images`, `annotations`, `categories`.

    Raises:
        UserError: no such file, not COCO, or none of the six classes in it.
    """

    def __init__(self, path: str) -> None:
        content = _read_coco(path)
        self.origin = f"annotations {Path(path).name}"
        classes = {c["id"]: class_of(str(c["name"])) for c in content["categories"]}
        self.ignored = sorted(str(c["name"]) for c in content["categories"] if classes[c["id"]] is None)
        self.valid = tuple(k in classes.values() for k in range(NUM_CLASSES))
        if not any(self.valid):
            raise UserError(
                f"masks.annotations {path}: none of its categories is one of the six classes "
                f"({', '.join(MASK_CLASSES)}); it has {', '.join(self.ignored[:8])}"
            )
        if self.ignored:
            log.info("%s: categories outside the six classes: %s", path, ", ".join(self.ignored))
        self.images = {image["id"]: image for image in content["images"]}
        self.by_name = _by_name(content["images"])
        self.by_image: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            class_index = classes.get(annotation["category_id"])
            if class_index is not None:
                self.by_image[annotation["image_id"]].append((class_index, annotation.get("segmentation")))

    def find(self, photo_id: str) -> Any | None:
        """The file's own image id of a photo, or None."""
        for name in (photo_id, PurePosixPath(photo_id).name, PurePosixPath(photo_id).stem):
            if name in self.by_name:
                return self.by_name[name]
        return None

    def label(self, photo: Photo, limits: Limits) -> PhotoMasks | None:
        """Masks of a photo, or None where the file does not know it. Raises ValueError for a damaged annotation, or one
        of another shape than the photo's (of another size is fine: masks are scaled)."""
        image_id = self.find(photo.id)
        if image_id is None:
            return None
        image = self.images[image_id]
        height, width = int(image["height"]), int(image["width"])
        if abs(width * photo.height - height * photo.width) > max(photo.width, photo.height):
            raise ValueError(
                f"annotated as {width}x{height} pixels, but the upright photo has {photo.width}x{photo.height}: another "
                f"photo, or drawn on it before its EXIF rotation"
            )
        canvas = Canvas(photo.width, photo.height, limits)
        box = (0, 0, photo.width, photo.height)
        for class_index, segmentation in self.by_image[image_id]:
            mask = decode_segmentation(segmentation, height, width).astype(np.uint8)
            canvas.add(class_index, box, shrink_bits(mask, *canvas.bits.shape) > 0, 1.0)
        return canvas.masks(self.origin, self.valid, real=True)


class RealBackend:
    """Published masks first, then the source's own, then (where given) another backend.

    Args:
        coco: annotations; None: only masks that the source brings.
        limits: what counts as an object (drawn objects of any size count: only an empty one is refused).
        fallback: asked for photos without real masks; None leaves them without masks.
    """

    def __init__(
        self, coco: CocoMasks | None = None, limits: Limits | None = None, fallback: Backend | None = None
    ) -> None:
        self.coco = coco
        self.limits = limits or Limits(min_object_size=1)
        self.fallback = fallback
        real = self.coco.origin if self.coco else SOURCE_MASKS
        self.origin = f"{real}, else {fallback.origin}" if fallback else real

    def label(self, photos: Sequence[Photo]) -> list[PhotoMasks | None]:
        """Masks of each photo; None where no real ones are known and there is no fallback."""
        found = [self._real(photo) for photo in photos]
        missing = [i for i, masks in enumerate(found) if masks is None]
        if missing and self.fallback is not None:
            for i, masks in zip(missing, self.fallback.label([photos[i] for i in missing]), strict=True):
                found[i] = masks
        return found

    def _real(self, photo: Photo) -> PhotoMasks | None:
        masks = self.coco.label(photo, self.limits) if self.coco else None
        if masks is None and photo.masks is not None:
            masks = own_masks(photo)
        return masks


def own_masks(photo: Photo) -> PhotoMasks:
    """The masks that a source brings with a photo, at working resolution; ValueError where it brings none."""
    if photo.masks is None:
        raise ValueError(f"{photo.id} brings no masks")
    canvas = Canvas(photo.width, photo.height, Limits())
    height, width = canvas.bits.shape
    small = photo.masks.shape[0] <= height and photo.masks.shape[1] <= width
    bits = photo.masks if small else shrink_bits(photo.masks, height, width)
    valid = photo.masks_valid
    bits = bits & np.uint8(sum(1 << k for k in range(NUM_CLASSES) if valid[k]))
    present = [bool((bits >> k & 1).any()) for k in range(NUM_CLASSES)]
    return PhotoMasks(
        bits=np.ascontiguousarray(bits),
        valid=valid,
        confidence=tuple(float(p) for p in present),
        origin=SOURCE_MASKS,
        width=photo.width,
        height=photo.height,
        objects=tuple(int(p) for p in present),
        real=True,
    )


def _read_coco(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError:
        raise UserError(f"masks.annotations {path}: no such file; give a COCO JSON with RLE masks") from None
    except ValueError as error:
        raise UserError(f"masks.annotations {path}: not JSON ({str(error)[:80]})") from None
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(name), list) for name in lists):
        raise UserError(f"masks.annotations {path}: not COCO; it needs the lists {', '.join(lists)}")
    needed = {
        "images": ("id", "width", "height"),
        "annotations": ("image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for name, keys in needed.items():
        for entry in content[name]:
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise UserError(f"masks.annotations {path}: an entry of {name} lacks {', '.join(missing)}")
    return content


def _by_name(images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Names -> the file's image ids: by id, else path, else file name, else stem.

    A name that two images share at the same level is left out: which of them is meant is not known, and masks of
    another photo are worse than none.
    """
    found: dict[str, Any] = {}
    paths = [(image["id"], PurePosixPath(str(image.get("file_name", "")))) for image in images]
    for level in (lambda i, p: str(i), lambda i, p: str(p), lambda i, p: p.name, lambda i, p: p.stem):
        here: dict[str, set[Any]] = defaultdict(set)
        for image_id, path in paths:
            here[level(image_id, path)].add(image_id)
        for name, ids in here.items():
            if name and name not in found and len(ids) == 1:
                found[name] = ids.pop()
    return found
