"""Every quirk of real data in one build: each record is used, repaired with a count, or rejected with its reason."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from roadwork.data.build import build
from roadwork.data.index import ShardIndex
from roadwork.data.plan import BuildOptions
from roadwork.data.verify import verify
from tests.data.photos import encode, nested, row, scene, write


def picture(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": "x"}


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(scene(1, 96, 64), exif=exif.tobytes())


def bomb() -> bytes:
    data = bytearray(encode(scene(1, 64, 64)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 12_500, 12_500)
    return bytes(data)


def palette() -> bytes:
    return encode(Image.fromarray(scene(1)).quantize(16), "PNG")


RGB = Image.fromarray(scene(1))
USED: dict[str, dict[str, Any]] = {
    "portrait": {"image": picture(encode(scene(1, 64, 96)))},
    "as the service sends it": {"image": picture(encode(scene(1, 224, 224)))},
    "twelve megapixels": {"image": picture(encode(np.full((3024, 4032, 3), 90, np.uint8)))},
    "webp": {"image": picture(encode(scene(1), "WEBP"))},
    "place at the pole": {"gps": "[90.0, 180.0]"},
    "place as numbers": {"gps": "(51.5, 0.0)"},
    "weather of several": {"scene_level_tags.weather": "['Unknown', 'Rain', 'Snow']"},
    "no tags at all": {f"scene_level_tags.{name}": None for name in ("weather", "daytime", "scene_environment")},
    "no video": {"video_info.vid_id": None},
    "no words": {"scene_description": None, "city_name": None},
}
REPAIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "no gps": ("gps_missing", {"gps": None}),
    "empty gps": ("gps_empty", {"gps": " "}),
    "gps of words": ("gps_not_a_pair", {"gps": "near the bridge"}),
    "gps of three": ("gps_not_a_pair", {"gps": "[1.0, 2.0, 3.0]"}),
    "gps off the globe": ("gps_out_of_range", {"gps": "[95.0, 200.0]"}),
    "gps the wrong way round": ("gps_swapped", {"gps": "[-122.4, 37.8]"}),
    "gps of a camera without a fix": ("gps_zero", {"gps": "[0.0, 0.0]"}),
    "gps as numpy prints it": ("gps_numpy_text", {"gps": "[np.float64(40.0), np.float64(-80.0)]"}),
    "strange weather": ("weather_unrecognised", {"scene_level_tags.weather": "['Hail']"}),
    "weather cut short": ("weather_not_a_list", {"scene_level_tags.weather": "['Rain'"}),
    "grey": ("image_greyscale", {"image": picture(encode(RGB.convert("L")))}),
    "cmyk": ("image_cmyk", {"image": picture(encode(RGB.convert("CMYK")))}),
    "palette": ("image_palette", {"image": picture(palette())}),
    "transparent": ("image_transparency", {"image": picture(encode(RGB.convert("RGBA"), "PNG"))}),
    "16 bits": (
        "image_16_bit",
        {"image": picture(encode(Image.fromarray(np.full((64, 96), 30_000, np.uint16)), "PNG"))},
    ),
    "turned": ("image_exif_rotated", {"image": picture(turned(6))}),
}
REJECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "label of another task": ("label_outside_0_1: 2.0", {"label": 2}),
    "an id of\u2028two lines": ("label_outside_0_1: 3.0", {"label": 3}),
    "an id of\rtwo lines": ("id_control_character", {}),
    "an id of\x85two lines": ("id_control_character", {}),
    "half a label": ("label_outside_0_1: 0.5", {"label": 0.5}),
    "no photo": ("no_image", {"image": None}),
    "no bytes": ("no_image", {"image": picture(b"")}),
    "cut photo": ("truncated_image", {"image": picture(encode(scene(1, 320, 240))[:6000])}),
    "text for a photo": ("not_an_image", {"image": picture(b"<html>404</html>")}),
    "bomb": ("too_many_pixels: 12500x12500, 150000000 are allowed", {"image": picture(bomb())}),
    "speck": ("too_small: 8x8, sides of at least 16 are needed", {"image": picture(encode(scene(1, 64, 64)[:8, :8]))}),
}


def everything() -> list[dict[str, Any]]:
    """One row per quirk, called by it, each in a video of its own; then one whose id was there before."""
    changes = USED | {name: change for name, (_, change) in (REPAIRED | REJECTED).items()}
    rows = [
        row(i, **({"id": name, "label": float(i % 2), "video_info.vid_id": f"v{i}"} | change))
        for i, (name, change) in enumerate(changes.items())
    ]
    return [*rows, row(99, id="portrait", label=1.0, **{"video_info.vid_id": "v99"})]


@pytest.fixture(scope="module", params=["flat dotted columns", "nested structs"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("quirks")
    rows = everything() if request.param.startswith("flat") else [nested(line) for line in everything()]
    write(folder / "src" / "train-0.parquet", rows)
    options = BuildOptions(str(folder / "src"), str(folder / "out"), view_size=64, val_fraction=0.2, processes=1)
    manifest = build(options).manifest
    assert manifest is not None
    return folder / "out", manifest


def ids(folder: Path) -> dict[str, tuple[ShardIndex, int]]:
    found = {}
    for split in ("train", "val"):
        index = ShardIndex.open(folder, split)
        found |= {str(name): (index, place) for place, name in enumerate(index.id)}
    return found


def test_what_can_be_used_is_there_and_what_cannot_is_named(made: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = made
    assert set(ids(folder)) == set(USED) | set(REPAIRED)
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_bytes().splitlines()]
    told = [(line["id"], line["reason"]) for line in lines]
    expected = [(name, reason) for name, (reason, _) in REJECTED.items()] + [("portrait", "duplicate_id")]
    assert sorted(told) == sorted(expected) and {line["split"] for line in lines} <= {"train", "val"}
    records = manifest["records"]
    assert records["read"] == len(everything()) == records["used"] + records["rejected"]
    assert records["used_repaired"] == len(REPAIRED) and records["used_as_they_are"] == len(USED)
    assert verify(folder, pixels=True) == []


def test_every_repair_is_counted_by_its_name(made: tuple[Path, dict[str, Any]]) -> None:
    _, manifest = made
    counted: dict[str, int] = {}
    for note, _ in REPAIRED.values():
        counted[note] = counted.get(note, 0) + 1
    assert manifest["repairs"] == counted
    reasons: dict[str, int] = {"duplicate_id": 1}
    for reason, _ in REJECTED.values():
        word = reason.partition(":")[0]
        reasons[word] = reasons.get(word, 0) + 1
    assert manifest["rejected_reasons"] == reasons


def test_a_repaired_record_holds_nothing_that_was_guessed(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    found = ids(folder)
    for name, (note, _) in REPAIRED.items():
        index, place = found[name]
        unknown = note.startswith("gps") and note != "gps_numpy_text"
        assert np.isnan(index.latitude[place]) == np.isnan(index.longitude[place]) == unknown, name
        assert (index.weather[place] == -1) == note.startswith("weather"), name
        assert index.gps_weight[place] == 1.0
    index, place = found["gps as numpy prints it"]
    assert (index.latitude[place], index.longitude[place]) == (40.0, -80.0)


@pytest.mark.parametrize(
    ("name", "width", "height", "views"),
    [
        ("portrait", 64, 96, 1),
        ("as the service sends it", 224, 224, 1),
        ("turned", 64, 96, 1),
        ("twelve megapixels", 4032, 3024, 12),
    ],
)
def test_sizes_are_those_of_the_upright_photo(
    made: tuple[Path, dict[str, Any]], name: str, width: int, height: int, views: int
) -> None:
    index, place = ids(made[0])[name]
    assert (index.width[place], index.height[place], index.num_views[place]) == (width, height, views)
    assert index.read_views(place).shape == (views, 3, 64, 64)


def test_the_first_known_weather_and_the_missing_tags_arrive(made: tuple[Path, dict[str, Any]]) -> None:
    found = ids(made[0])
    index, place = found["weather of several"]
    assert index.weather[place] == 3, "rain"
    index, place = found["no tags at all"]
    assert index.weather[place] == index.daytime[place] == index.scene[place] == -1
    index, place = found["no video"]
    assert str(index.group[place]).startswith("cell:"), "without a video, the street corner is the group"
