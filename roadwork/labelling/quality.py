"""How far a folder of masks can be trusted: against labels, against exact masks, against another backend.

Everything is counted on at most `SAMPLE` photos, evenly spread over the source.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roadwork.data.mask_files import ABOUT, PhotoMasks, read_masks, shrink_bits, write_atomically
from roadwork.data.record import MASK_CLASSES
from roadwork.labelling.backend import Photo
from roadwork.labelling.real import own_masks
from roadwork.labelling.sheet import contact_sheet
from roadwork.labelling.source import PhotoSource

log = logging.getLogger(__name__)

SAMPLE = 2000
PICTURES = 12
LISTED = 50
SUSPICIOUS = 3
"""A photo labelled 'no roadwork' with at least this many objects is listed."""


def write_quality(out: Path, photos: PhotoSource, other: Path | None = None) -> dict[str, Any]:
    """`about/quality.json` and the contact sheet `about/quality.png` of a folder of masks.

    Args:
        out: the folder of masks.
        photos: the source that was labelled.
        other: a second folder, made by another backend from the same source.
    """
    chosen = spread(len(photos.ids), SAMPLE)
    found = {p: masks for p in chosen if (masks := _read(out, photos.ids[p])) is not None}
    report: dict[str, Any] = {
        "photos": len(photos.ids),
        "looked_at": len(chosen),
        "with_masks": len(found),
        "origins": sorted({masks.origin for masks in found.values()}),
        "by_label": by_label({p: photos.labels[p] for p in found}, found),
    }
    listed = suspicious({photos.ids[p]: (photos.labels[p], masks) for p, masks in found.items()})
    report |= {"suspicious_count": len(listed), "suspicious": listed[:LISTED]}
    exact, pictures = _against_exact(photos, found)
    if exact is not None:
        report["exact"] = exact
    if other is not None:
        pairs = [(masks, twin) for p, masks in found.items() if (twin := _read(other, photos.ids[p])) is not None]
        report["agreement"] = {"folder": str(other), "photos": len(pairs), "classes": agreement(pairs)}
    if pictures:
        write_atomically(out / ABOUT / "quality.png", contact_sheet(pictures))
    write_atomically(out / ABOUT / "quality.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def spread(count: int, at_most: int) -> list[int]:
    """Up to `at_most` positions of 0..count-1, evenly spread and ascending."""
    return sorted({i * count // min(count, at_most) for i in range(min(count, at_most))})


def by_label(labels: dict[int, int | None], found: dict[int, PhotoMasks]) -> dict[str, dict[str, Any]]:
    """Share of the photos of each label that show each class, among those where the class is valid."""
    report: dict[str, dict[str, Any]] = {}
    for name, wanted in (("roadwork", 1), ("no_roadwork", 0), ("unlabelled", None)):
        group = [masks for p, masks in found.items() if labels[p] == wanted]
        shares = {}
        for k, class_name in enumerate(MASK_CLASSES):
            shown = [_has(masks, k) for masks in group if masks.valid[k]]
            shares[class_name] = round(float(np.mean(shown)), 4) if shown else None
        report[name] = {"photos": len(group), "share_with": shares}
    return report


def suspicious(photos: dict[str, tuple[int | None, PhotoMasks]]) -> list[dict[str, Any]]:
    """Photos labelled 'no roadwork' that are full of it: the label or the mask is wrong. Most objects first."""
    lines = [
        {"id": photo_id, "objects": dict(zip(MASK_CLASSES, masks.objects, strict=True)), "count": sum(masks.objects)}
        for photo_id, (label, masks) in photos.items()
        if label == 0 and sum(masks.objects) >= SUSPICIOUS
    ]
    return sorted(lines, key=lambda line: (-int(str(line["count"])), str(line["id"])))


def agreement(pairs: Sequence[tuple[PhotoMasks, PhotoMasks]]) -> dict[str, dict[str, Any]]:
    """Per class, over photos where both looked for it: IoU of all pixels together, and Cohen's kappa of presence.

    None where there is nothing to compare: no such photo, or neither shows the class (IoU), or both always agree by
    chance (kappa).
    """
    made = {}
    for k, name in enumerate(MASK_CLASSES):
        both = either = 0.0
        table = np.zeros((2, 2))
        for one, two in pairs:
            if not (one.valid[k] and two.valid[k]):
                continue
            a = one.bits >> k & 1
            b = shrink_bits(two.bits, *one.bits.shape) >> k & 1
            # Pixels as shares of the photo: large photos do not outvote small ones.
            both += float((a & b).mean())
            either += float((a | b).mean())
            table[_has(one, k), _has(two, k)] += 1
        made[name] = {
            "photos": int(table.sum()),
            "iou": round(both / either, 4) if either else None,
            "presence_kappa": _kappa(table),
        }
    return made


def _kappa(table: np.ndarray) -> float | None:
    total = table.sum()
    if not total:
        return None
    chance = float((table.sum(0) * table.sum(1)).sum() / total**2)
    return round((float(np.trace(table) / total) - chance) / (1 - chance), 4) if chance < 1 else None


def _against_exact(
    photos: PhotoSource, found: dict[int, PhotoMasks]
) -> tuple[dict[str, Any] | None, list[tuple[Photo, PhotoMasks]]]:
    """IoU against masks that the source brings, and some photos to look at. Reads at most 200 photos again."""
    positions = [list(found)[i] for i in spread(len(found), 200)]
    shown = {positions[i] for i in spread(len(positions), PICTURES)}
    pairs: list[tuple[PhotoMasks, PhotoMasks]] = []
    pictures: list[tuple[Photo, PhotoMasks]] = []
    for position, photo in photos.load(positions):
        if isinstance(photo, str):
            continue
        if photo.masks is not None:
            pairs.append((found[position], own_masks(photo)))
        if position in shown:
            pictures.append((photo, found[position]))
        elif not pairs and len(pictures) == len(shown):
            break
    return ({"photos": len(pairs), "classes": agreement(pairs)} if pairs else None), pictures


def _has(masks: PhotoMasks, class_index: int) -> int:
    return int((masks.bits >> class_index & 1).any())


def _read(folder: Path, photo_id: str) -> PhotoMasks | None:
    try:
        return read_masks(folder, photo_id)
    except ValueError as error:
        log.warning("%s", error)
        return None
