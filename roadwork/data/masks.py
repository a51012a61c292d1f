"""A folder of masks made by another stage: `<id>.png` of class bits, `<id>.json` with validity and confidence."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

from roadwork.data.record import MASK_CLASSES, Rejected
from roadwork.errors import UserError

_CLASSES = len(MASK_CLASSES)


def mask_stem(photo_id: str) -> str:
    """File name without ending for a photo's masks: the id where that is a safe name, else a digest of it."""
    safe = 0 < len(photo_id) <= 100 and all(c.isalnum() or c in "-_." for c in photo_id) and photo_id[0] != "."
    return photo_id if safe else "sha256-" + hashlib.sha256(photo_id.encode()).hexdigest()[:40]


class MaskFolder:
    """Masks by photo id."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--masks {folder}: no such folder; give one that launch/pseudo_masks.py wrote")

    def stamp(self, photo_id: str) -> str:
        """Changes when the masks of a photo may have changed."""
        stem = mask_stem(photo_id)
        found = []
        for name in (f"{stem}.png", f"{stem}.json"):
            try:
                info = (self.folder / name).stat()
                found.append(f"{info.st_size} {info.st_mtime_ns}")
            except OSError:
                found.append("none")
        return ", ".join(found)

    def get(self, photo_id: str) -> tuple[bytes, list[bool], list[float]] | None:
        """(PNG bytes, valid [6], confidence [6]) or None. Without a JSON beside it a mask counts as exact.

        Raises Rejected where the PNG is not the one that the JSON describes.
        """
        stem = mask_stem(photo_id)
        try:
            data = (self.folder / f"{stem}.png").read_bytes()
        except OSError:
            return None
        try:
            facts = json.loads((self.folder / f"{stem}.json").read_text())
        except FileNotFoundError:
            return data, [True] * _CLASSES, [1.0] * _CLASSES
        except (OSError, ValueError) as error:
            raise UserError(f"--masks: {self.folder / stem}.json cannot be read ({error})") from error
        if "crc32" in facts and zlib.crc32(data) != facts["crc32"]:
            raise Rejected("masks_damaged: the PNG differs from the checksum beside it")
        valid = [bool(v) for v in facts.get("masks_valid", [True] * _CLASSES)]
        confidence = [float(v) for v in facts.get("masks_confidence", [1.0] * _CLASSES)]
        if len(valid) != _CLASSES or len(confidence) != _CLASSES:
            raise UserError(
                f"--masks: {self.folder / stem}.json must hold {_CLASSES} values of masks_valid and masks_confidence"
            )
        return data, valid, confidence
