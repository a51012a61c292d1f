"""Small photos and parquet files in the public schema, made on the fly."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def scene(seed: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 [H, W, 3]: coloured rectangles on a gradient; different for every seed."""
    rng = np.random.default_rng(seed)
    rgb = np.zeros((height, width, 3), dtype=np.uint8)
    rgb[...] = np.linspace(40, 200, width, dtype=np.uint8)[None, :, None]
    for _ in range(12):
        x, y = rng.integers(0, width - 8), rng.integers(0, height - 8)
        w, h = rng.integers(8, width // 2), rng.integers(8, height // 2)
        rgb[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return rgb


def encode(rgb: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    """Encoded bytes of an array or picture."""
    stream = io.BytesIO()
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    image.save(stream, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options)
    return stream.getvalue()


def repeated_scans(jpeg: bytes, times: int, between: bytes = b"") -> bytes:
    """The JPEG with its last scan repeated: a few bytes each, and each a walk over the whole picture."""
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + (between + last) * times + b"\xff\xd9"


def row(number: int, **changes: Any) -> dict[str, Any]:
    """One flat row of the public schema."""
    label = changes.pop("label", number % 2)
    values: dict[str, Any] = {
        "image": {"bytes": encode(scene(number)), "path": f"{number}.jpg"},
        "id": number,
        "width": 96,
        "height": 64,
        "license": 1,
        "flickr_url": None,
        "coco_url": None,
        "date_captured": 0,
        "gps": f"[{39.0 + number * 0.01}, {-86.0 - number * 0.01}]",
        "city_name": "indianapolis" if number % 3 else "pittsburgh",
        "scene_description": "men at work" if label == 1 else None,
        "video_info.frame_id": str(number),
        "video_info.seq_id": 0,
        "video_info.vid_id": f"vid{number // 3}",
        "scene_level_tags.daytime": "Light",
        "scene_level_tags.scene_environment": "Urban",
        "scene_level_tags.travel_alteration": "['Partially Blocked']" if label == 1 else None,
        "scene_level_tags.weather": "['Sunny']",
        "label": label,
    }
    return values | changes


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names to nested structs."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        parent, dot, child = name.partition(".")
        if dot:
            out.setdefault(parent, {})[child] = value
        else:
            out[name] = value
    return out


def write(path: Path, rows: list[dict[str, Any]], row_group: int = 4, types: dict[str, Any] | None = None) -> Path:
    """Rows to a parquet file with several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, kind in (types or {}).items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, table[name].cast(kind))
    pq.write_table(table, path, row_group_size=row_group)
    return path


def dataset(folder: Path, train: int = 24, test: int = 6) -> Path:
    """A folder laid out like the hub's: data/train-*.parquet and data/test-*.parquet."""
    half = train // 2
    write(folder / "data" / "train-00000-of-00002.parquet", [row(i) for i in range(half)])
    write(folder / "data" / "train-00001-of-00002.parquet", [row(i) for i in range(half, train)])
    write(folder / "data" / "test-00000-of-00001.parquet", [row(i) for i in range(1000, 1000 + test)])
    return folder
