"""A folder of masks: per photo `<id>.png` (one bit per class) and `<id>.json` (validity, confidence, origin).

A photo without files has NO mask; a photo whose class is valid and whose bits are all 0 has an EMPTY one. The json is
written last and carries the checksum of the PNG, so a pair is either complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from roadwork.data.decode import MAX_MASK_BYTES
from roadwork.data.record import MASK_CLASSES

NUM_CLASSES = len(MASK_CLASSES)
ABOUT = "about"
"""Folder beside the masks for everything that belongs to no single photo."""
SOURCE_MASKS = "masks of the source"
"""Origin of masks that came with the photos."""


@dataclass(frozen=True)
class PhotoMasks:
    """Masks of one photo.

    Attributes:
        bits: uint8 [h, w]; bit k is class k of `MASK_CLASSES`. Any size; it stretches over the whole photo.
        valid: 6 booleans; False where nobody looked for the class (its bits are 0 and mean nothing).
        confidence: 6 numbers in [0, 1]; largest score of an object of the class, 0 where there is none.
        origin: what made the masks, e.g. "facebook/sam3" or "random-tiny (randomly initialised)".
        width, height: the photo's size in pixels.
        objects: objects per class that the bits unite.
        real: people drew them (or a renderer knows them); a model's masks never replace these in the pipeline.
    """

    bits: np.ndarray
    valid: tuple[bool, ...]
    confidence: tuple[float, ...]
    origin: str
    width: int
    height: int
    objects: tuple[int, ...] = field(default=(0,) * NUM_CLASSES)
    real: bool = False

    def __post_init__(self) -> None:
        if self.bits.ndim != 2 or self.bits.dtype != np.uint8 or not self.bits.size:
            raise ValueError(f"bits are {self.bits.dtype} {self.bits.shape}; needed: uint8 [h, w]")
        for name in ("valid", "confidence", "objects"):
            if len(getattr(self, name)) != NUM_CLASSES:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; needed: {NUM_CLASSES}")


def file_stem(photo_id: str) -> str:
    """File name of an id without suffix: the id itself where that is a safe name, else a digest of it."""
    # in bytes: that is what a disk's limit on names counts
    safe = 0 < len(photo_id.encode()) <= 100 and all(c.isalnum() or c in "-_." for c in photo_id) and photo_id[0] != "."
    return photo_id if safe else "sha256-" + hashlib.sha256(photo_id.encode()).hexdigest()[:40]


def mask_paths(folder: str | os.PathLike[str], photo_id: str) -> tuple[Path, Path]:
    """Paths of the PNG and the json."""
    stem = Path(folder, file_stem(photo_id))
    return Path(f"{stem}.png"), Path(f"{stem}.json")


def write_masks(folder: str | os.PathLike[str], photo_id: str, masks: PhotoMasks) -> int:
    """Write both files atomically, the json last. The same masks give the same bytes. Returns the PNG's bytes."""
    png_path, json_path = mask_paths(folder, photo_id)
    png, bits = _encode(masks.bits)
    facts = {
        "id": photo_id,
        "masks_valid": [bool(v) for v in masks.valid],
        "masks_confidence": [round(float(c), 4) for c in masks.confidence],
        "objects": [int(n) for n in masks.objects],
        "origin": masks.origin,
        "real": masks.real,
        "photo": [masks.width, masks.height],
        "mask": [bits.shape[1], bits.shape[0]],
        "crc32": zlib.crc32(png),
    }
    write_atomically(png_path, png)
    write_atomically(json_path, (json.dumps(facts, indent=1) + "\n").encode())
    return len(png)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_masks(folder: str | os.PathLike[str], photo_id: str) -> PhotoMasks | None:
    """Masks of a photo, or None where there are none.

    Raises:
        ValueError: a damaged pair (one line that names the file).
    """
    png_path, json_path = mask_paths(folder, photo_id)
    facts = _read_facts(json_path)
    if facts is None:
        return None
    try:
        png = png_path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{json_path} has no {png_path.name} beside it; label this photo again") from None
    if zlib.crc32(png) != facts["crc32"]:
        raise ValueError(f"{png_path} does not match the checksum in {json_path.name}; label this photo again")
    return PhotoMasks(
        bits=decode_bits(png),
        valid=tuple(facts["masks_valid"]),
        confidence=tuple(facts["masks_confidence"]),
        origin=facts["origin"],
        width=facts["photo"][0],
        height=facts["photo"][1],
        objects=tuple(facts["objects"]),
        real=bool(facts.get("real", False)),
    )


def has_masks(folder: str | os.PathLike[str], photo_id: str) -> bool:
    """Whether a complete, undamaged pair is there (reads the PNG's bytes, decodes nothing)."""
    png_path, json_path = mask_paths(folder, photo_id)
    try:
        facts = _read_facts(json_path)
        return facts is not None and zlib.crc32(png_path.read_bytes()) == facts["crc32"]
    except (ValueError, FileNotFoundError):
        return False


def decode_bits(png: bytes) -> np.ndarray:
    """uint8 [h, w] of a PNG of class bits. Raises ValueError for bytes that are no 8-bit grey image."""
    bits = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
    if bits is None or bits.dtype != np.uint8 or bits.ndim != 2:
        raise ValueError("not a PNG of class bits (8-bit grey)")
    return bits


def shrink_bits(bits: np.ndarray, height: int, width: int, share: float = 0.5) -> np.ndarray:
    """Resize class bits to [height, width], uint8: a pixel has a class where at least `share` of its area has it."""
    if bits.shape == (height, width):
        return bits
    made = np.zeros((height, width), np.uint8)
    smaller = height <= bits.shape[0] and width <= bits.shape[1]
    for k in range(NUM_CLASSES):
        plane: Any = (bits >> k & 1).astype(np.float32)
        if plane.any():
            plane = cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
            made |= (plane >= share).astype(np.uint8) << np.uint8(k)
    return made


def _encode(bits: np.ndarray) -> tuple[bytes, np.ndarray]:
    while True:
        done, png = cv2.imencode(".png", bits, [cv2.IMWRITE_PNG_COMPRESSION, 9])
        if not done:
            raise ValueError(f"could not encode bits of shape {bits.shape} as PNG")
        if len(png) <= MAX_MASK_BYTES:
            return png.tobytes(), bits
        # More detail than that is kept at half the size: masks stretch over the photo whatever their size.
        bits = shrink_bits(bits, (bits.shape[0] + 1) // 2, (bits.shape[1] + 1) // 2)


def _read_facts(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is no description of masks in JSON; label this photo again")
    missing = {"masks_valid", "masks_confidence", "objects", "origin", "photo", "crc32"} - set(facts)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; label this photo again")
    return facts
