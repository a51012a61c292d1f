"""A folder of masks made by another stage: `<id>.png` of class bits, `<id>.json` with validity and confidence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from roadwork.data.record import MASK_CLASSES
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

    def get(self, photo_id: str) -> tuple[bytes, list[bool], list[float]] | None:
        """(PNG bytes, valid [6], confidence [6]) or None. Without a JSON beside it a mask counts as exact."""
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
        valid = [bool(v) for v in facts.get("masks_valid", [True] * _CLASSES)]
        confidence = [float(v) for v in facts.get("masks_confidence", [1.0] * _CLASSES)]
        if len(valid) != _CLASSES or len(confidence) != _CLASSES:
            raise UserError(
                f"--masks: {self.folder / stem}.json must hold {_CLASSES} values of masks_valid and masks_confidence"
            )
        return data, valid, confidence
