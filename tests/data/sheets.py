"""Small shards for the tests of the data plane; every pixel is a function of the sample's number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from roadwork.data.index import write_index
from roadwork.data.scan import scan_shard
from roadwork.data.shards import Sample, shard_name, write_shard
from roadwork.data.views import make_mask_views, make_views, view_boxes

SIZE = 32
SHAPES = ((160, 90), (120, 90), (30, 30), (90, 160), (300, 300))


def sample(i: int, size: int = SIZE, masks: bool | None = None, **meta: Any) -> Sample:
    width, height = SHAPES[i % len(SHAPES)]
    if width > 200 or size > 64:
        width, height = width * 4, height * 4
    rng = np.random.default_rng(i)
    photo = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width, height))
    boxes = view_boxes(width, height, size)
    bits = cv2.resize(rng.integers(0, 64, (3, 4), dtype=np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    with_masks = i % 3 == 0 if masks is None else masks
    line: dict[str, Any] = {
        "label": i % 2 if i % 7 else None,
        "latitude": 40.0 + i / 100 if i % 5 else None,
        "longitude": -70.0 - i / 100 if i % 5 else None,
        "gps_weight": 1.0 + i % 4,
        "group": f"video{i // 4}",
        "width": width,
        "height": height,
        "weather": i % 8 if i % 6 else None,
        "daytime": i % 6,
        "scene": None,
        "city": "Ghent" if i % 2 else "",
        "id": f"photo.{i}",
    }
    if with_masks:
        line.update(masks_valid=[True, False, True, True, False, True], masks_confidence=[0.9] * 6)
    line.update(meta)
    view_masks = make_mask_views(bits, boxes, size) if with_masks else None
    return Sample(f"{i:08d}", make_views(photo, boxes, size), boxes, line, view_masks)


def build(folder: Path, counts: dict[str, int] | None = None, per_shard: int = 8, size: int = SIZE) -> Path:
    """Shards of `counts` samples per split; sample i of a split has number i (train) or 1000 + i, 2000 + i, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    scanned = []
    for s, (split, count) in enumerate((counts or {"train": 21, "val": 5}).items()):
        for number, first in enumerate(range(0, count, per_shard)):
            path = folder / shard_name(split, number)
            write_shard(path, (sample(1000 * s + i, size) for i in range(first, min(first + per_shard, count))))
            scanned.append(scan_shard(path))
    write_index(folder, scanned, {"note": "made by a test"})
    return folder
