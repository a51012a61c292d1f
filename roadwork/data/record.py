"""One photo with what is known about it, and how a raw row of the public schema becomes one.

The schema is that of the hub's `natix-network-org/roadwork`: flat columns whose names hold dots
(`scene_level_tags.weather`), or the same as nested structs; `gps` a string "[latitude, longitude]";
weather a stringified list of several. Nothing is guessed: what cannot be read is repaired with a
named note, or the row is rejected with a named reason.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WEATHER = ("sunny", "partly_cloudy", "cloudy", "rain", "snow", "fog", "wind", "unknown")
DAYTIME = ("light", "dark", "twilight", "dawn", "dusk", "unknown")
SCENE = ("urban", "suburban", "highway", "rural", "residential", "other", "unknown")
MASK_CLASSES = ("cone", "barrier", "sign", "worker", "vehicle", "equipment")
"""Bit k of a mask is class k."""

_ALIASES = {
    "clear": "sunny",
    "overcast": "cloudy",
    "rainy": "rain",
    "snowy": "snow",
    "foggy": "fog",
    "windy": "wind",
    "day": "light",
    "daytime": "light",
    "night": "dark",
}

REQUIRED_COLUMNS = (
    "image",
    "id",
    "gps",
    "city_name",
    "scene_description",
    "video_info.vid_id",
    "scene_level_tags.daytime",
    "scene_level_tags.scene_environment",
    "scene_level_tags.weather",
    "label",
)
OPTIONAL_COLUMNS = (
    "width",
    "height",
    "license",
    "flickr_url",
    "coco_url",
    "date_captured",
    "video_info.frame_id",
    "video_info.seq_id",
    "scene_level_tags.travel_alteration",
    "masks",
)
PROVENANCE = {
    "license": "license",
    "date_captured": "date_captured",
    "flickr_url": "flickr_url",
    "coco_url": "coco_url",
    "frame_id": "video_info.frame_id",
    "seq_id": "video_info.seq_id",
}
"""Fields that nothing is learned from, and their columns: the leak audit alone looks at them."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DIGITS, _MIXED = re.compile(r"\d+"), re.compile(r"[A-Za-z]*0[A-Za-z]+0[A-Za-z0]*")
ROADS_SOUTH, ROADS_NORTH = -60.0, 80.0
"""Degrees of latitude between which there are roads: south of them is Antarctica alone."""
_NUMPY_NUMBER = re.compile(r"np\.float\d+\(([^()]*)\)")
"""How str() of a list writes numpy's numbers since numpy 2."""


class Rejected(Exception):
    """A row that cannot be used. `reason` starts with a stable word (`label_outside_0_1`, `truncated_image`, ...)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Record:
    """A photo and its metadata; None means not known. `repairs` names what had to be put right."""

    id: str
    image: bytes = b""
    label: int | None = None
    latitude: float | None = None
    longitude: float | None = None
    group: str | None = None
    weather: int | None = None
    daytime: int | None = None
    scene: int | None = None
    description: str = ""
    city: str = ""
    split: str | None = None
    masks: np.ndarray | None = None
    travel_alteration: str = ""
    provenance: tuple[Any, ...] = ()
    """As PROVENANCE: numbers, digests of texts, None where absent; empty where the source says nothing of them."""
    repairs: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def but(self, *repairs: str, **changes: Any) -> Record:
        """The same record with `changes`, and `repairs` added to its notes."""
        return dataclasses.replace(self, repairs=self.repairs + repairs, **changes)


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Nested structs to flat dotted names; `image` stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name != "image" and isinstance(value, Mapping):
            flat.update({f"{name}.{child}": item for child, item in value.items()})
        else:
            flat[name] = value
    return flat


def parse_row(row: Mapping[str, Any]) -> Record:
    """A row of the public schema to a Record (masks stay encoded in `extra["masks"]`).

    Raises Rejected for an id that is missing or holds a control character, or a label outside {0, 1}.
    """
    row = flatten(row)
    notes: list[str] = []
    latitude, longitude = parse_gps(row.get("gps"), notes)
    return Record(
        id=parse_id(row.get("id")),
        image=image_bytes(row.get("image")),
        label=parse_label(row.get("label")),
        latitude=latitude,
        longitude=longitude,
        group=parse_text(row.get("video_info.vid_id")) or None,
        weather=parse_tag(row.get("scene_level_tags.weather"), WEATHER, "weather", notes),
        daytime=parse_tag(row.get("scene_level_tags.daytime"), DAYTIME, "daytime", notes),
        scene=parse_tag(row.get("scene_level_tags.scene_environment"), SCENE, "scene", notes),
        description=parse_text(row.get("scene_description")),
        city=parse_text(row.get("city_name")),
        travel_alteration=parse_text(row.get("scene_level_tags.travel_alteration")),
        provenance=parse_provenance(row),
        repairs=tuple(notes),
        extra={"masks": row["masks"]} if row.get("masks") is not None else {},
    )


def parse_id(value: Any) -> str:
    """An id without outer blanks. Raises Rejected for none, or one that would break a line of a CSV or of a log."""
    text = "" if value is None else str(value).strip()
    if not text:
        raise Rejected("missing_id")
    if _CONTROL.search(text):
        raise Rejected("id_control_character")
    return text


def image_bytes(value: Any) -> bytes:
    """The hub's image struct {"bytes", "path"}, or plain bytes; b"" where there are none."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return bytes(value) if value is not None else b""


def parse_text(value: Any) -> str:
    """A string without outer blanks; None, NaN and the words None, nan, null are empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    return "" if text.lower() in ("none", "nan", "null") else text


def parse_provenance(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The PROVENANCE of a flat row, small enough to be held for millions of photos.

    Numbers stay (also those written as text). A text keeps its words, while numbers and random names within it become 0
    (`.../train0/0.jpg`): few different ones are left of many URLs, and equal ones share their memory.
    """
    found = tuple(_digest(row.get(column)) for column in PROVENANCE.values())
    return () if all(value is None for value in found) else found


def _digest(value: Any) -> float | int | str | None:
    text = parse_text(value)
    if not text:
        return None
    if isinstance(value, (int, float)):
        return value
    try:
        return float(text)
    except ValueError:
        return sys.intern(_MIXED.sub("0", _DIGITS.sub("0", text[:200])))


def parse_label(value: Any) -> int | None:
    """0, 1 or None (unlabelled: null, NaN, empty, also as words). Raises Rejected for anything else."""
    if not parse_text(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Rejected(f"label_outside_0_1: {str(value)[:40]!r}") from None
    if number not in (0.0, 1.0):
        raise Rejected(f"label_outside_0_1: {str(value)[:40]}")
    return int(number)


def parse_gps(value: Any, notes: list[str]) -> tuple[float | None, float | None]:
    """ "[latitude, longitude]" or a pair to degrees; (None, None) with one note saying why not."""
    pair, note = value, ""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        note = "gps_missing"
    elif isinstance(value, str):
        if not value.strip():
            note = "gps_empty"
        else:
            pair = _literal(_NUMPY_NUMBER.sub(r"\1", value))
            if _NUMPY_NUMBER.search(value):
                notes.append("gps_numpy_text")
    if not note:
        note, latitude, longitude = check_pair(pair)
        if not note:
            return latitude, longitude
    notes.append(note)
    return None, None


def check_pair(pair: Any) -> tuple[str, float, float]:
    """(note, latitude, longitude): an empty note where the pair is a usable coordinate in degrees."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return "gps_not_a_pair", math.nan, math.nan
    try:
        latitude, longitude = float(pair[0]), float(pair[1])
    except (TypeError, ValueError):
        return "gps_not_a_pair", math.nan, math.nan
    if not (math.isfinite(latitude) and math.isfinite(longitude)):
        return "gps_not_finite", latitude, longitude
    if latitude == 0.0 and longitude == 0.0:
        return "gps_zero", latitude, longitude
    beyond = 90.0 < abs(latitude) <= 180.0 and abs(longitude) <= 90.0
    antarctic = -90.0 <= latitude < ROADS_SOUTH <= longitude <= ROADS_NORTH  # American places the wrong way round
    if beyond or antarctic:
        return "gps_swapped", latitude, longitude
    if abs(latitude) > 90.0 or abs(longitude) > 180.0:
        return "gps_out_of_range", latitude, longitude
    return "", latitude, longitude


def parse_tag(value: Any, vocabulary: tuple[str, ...], name: str, notes: list[str]) -> int | None:
    """First known word of a tag (a word, a list, or a stringified list) as its index; None for unknown.

    `unknown`, the last word of each vocabulary, counts as not known. Words outside the vocabulary are noted.
    """
    items = value
    if isinstance(value, str):
        items = _literal(value) if value.strip().startswith(("[", "(")) else [value]
        if not isinstance(items, (list, tuple)):
            notes.append(f"{name}_not_a_list")
            return None
    if not isinstance(items, (list, tuple)):
        items = [items]
    unrecognised = False
    for item in items:
        word = parse_text(item).lower().replace(" ", "_").replace("-", "_")
        word = _ALIASES.get(word, word)
        if word in vocabulary[:-1]:
            return vocabulary.index(word)
        unrecognised = unrecognised or word not in ("", "unknown")
    if unrecognised:
        notes.append(f"{name}_unrecognised")
    return None


def _literal(text: str) -> Any:
    """Literal value of a string as the public data writes lists; the string itself where it is none."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
