"""A folder of masks made by another stage: `<id>.png` of class bits, `<id>.json` with validity and confidence."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import NamedTuple

from roadwork.data.absent import if_there
from roadwork.data.mask_files import mask_paths
from roadwork.data.record import MASK_CLASSES, Rejected
from roadwork.errors import UserError

_CLASSES = len(MASK_CLASSES)


class EncodedMasks(NamedTuple):
    """Masks of one photo as they lie in the folder: PNG bytes, validity [6], confidence [6], what made them."""

    png: bytes
    valid: list[bool]
    confidence: list[float]
    origin: str
    real: bool


class MaskFolder:
    """Masks by photo id."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--masks {folder}: no such folder; give one that launch/pseudo_masks.py wrote")

    def stamp(self, photo_id: str) -> str:
        """Changes when the masks of a photo may have changed."""
        found = []
        for path in mask_paths(self.folder, photo_id):
            facts = "none"
            with if_there("--masks:", path):
                info = path.stat()
                facts = f"{info.st_size} {info.st_mtime_ns}"
            found.append(facts)
        return ", ".join(found)

    def get(self, photo_id: str) -> EncodedMasks | None:
        """Masks of a photo, or None where there are none. Without a JSON beside it a mask counts as exact.

        Raises Rejected where the PNG is not the one that the JSON describes, UserError where a file cannot be read.
        """
        png_path, json_path = mask_paths(self.folder, photo_id)
        data: bytes | None = None
        with if_there("--masks:", png_path):
            data = png_path.read_bytes()
        if data is None:
            return None
        try:
            facts = json.loads(json_path.read_text())
        except FileNotFoundError:
            facts = {}
        except (OSError, ValueError) as error:
            raise UserError(f"--masks: {json_path} cannot be read ({error})") from error
        if not isinstance(facts, dict):
            raise UserError(f"--masks: {json_path} is no description of masks; label this photo again")
        if "crc32" in facts and zlib.crc32(data) != facts["crc32"]:
            raise Rejected("masks_damaged: the PNG differs from the checksum beside it")
        valid = [bool(v) for v in facts.get("masks_valid", [True] * _CLASSES)]
        confidence = [float(v) for v in facts.get("masks_confidence", [1.0] * _CLASSES)]
        if len(valid) != _CLASSES or len(confidence) != _CLASSES:
            raise UserError(f"--masks: {json_path} must hold {_CLASSES} values of masks_valid and masks_confidence")
        origin = str(facts.get("origin", f"folder {self.folder.name}"))
        return EncodedMasks(data, valid, confidence, origin, bool(facts.get("real", "origin" not in facts)))
