"""The embedded street benchmark: drawn street photos with everything that the real data set has.

`draw(index, seed)` makes one photo, its exact masks and its row; `write_parquet` makes a data set of them in the real
schema (flat columns whose names contain dots, GPS as the string "[lat, lon]", lists as strings), plus one stated extra
column, `masks`: a PNG of uint8 in the photo's size whose bit k is class k of MASK_CLASSES.

A photo depends on (seed, index) alone, so any number of processes writes the same bytes. Photos come in videos of 2 or
3 frames that share a place; a video belongs to one split. Positives: a work zone of 3 to 14 objects. Negatives: at the
same spot, counterparts of the same size and colours that are not roadwork. Both have further look-alikes around them.
"""

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roadwork.cpu_memory import keep_freed_memory
from roadwork.data.street_cities import CITIES, FAMILIES, TARGET, City
from roadwork.data.street_light import WEATHERS, Conditions, expose
from roadwork.data.street_lookalikes import LOOKALIKES, TRAFFIC
from roadwork.data.street_objects import ROADWORK, Kind
from roadwork.data.street_pen import Image
from roadwork.data.street_scene import (
    Camera,
    Frame,
    Place,
    Thing,
    build_place,
    paint_street,
    paint_thing,
    paint_wire_and_poles,
)
from roadwork.errors import UserError

__all__ = ["CITIES", "MASK_CLASSES", "PRIOR", "SCHEMA", "Photo", "draw", "target_cities", "write_parquet"]

MASK_CLASSES = ("cone", "barrier", "sign", "worker", "vehicle", "equipment")
PRIOR = {"train": 0.8, "test": 0.5}
"""Share of positives aimed at in each split."""
TEST_PER_TEN = 3
"""Test videos among ten."""
_LENGTHS = (3, 2, 3, 2, 2, 3)
_STARTS = tuple(int(s) for s in np.cumsum((0, *_LENGTHS)))
_CLEAR = 0.12
"""Share of work-zone videos whose first frame was taken before the zone: same place, no roadwork."""
_MIN_PIXELS = 120
"""A positive photo shows at least this many pixels of roadwork."""
_JPEG_QUALITY = 90
_PNG = [
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE),
]
"""Masks are runs of equal bytes: smaller and sooner written than by the defaults."""
_ROWS_PER_FILE = 500

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("id", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("license", pa.int64()),
        ("flickr_url", pa.float64()),
        ("coco_url", pa.float64()),
        ("date_captured", pa.int64()),
        ("gps", pa.string()),
        ("city_name", pa.string()),
        ("scene_description", pa.string()),
        ("video_info.frame_id", pa.string()),
        ("video_info.seq_id", pa.int64()),
        ("video_info.vid_id", pa.string()),
        ("scene_level_tags.daytime", pa.string()),
        ("scene_level_tags.scene_environment", pa.string()),
        ("scene_level_tags.travel_alteration", pa.string()),
        ("scene_level_tags.weather", pa.string()),
        ("label", pa.int64()),
        ("masks", pa.binary()),
    ],
    metadata={"roadwork.mask_classes": json.dumps(MASK_CLASSES)},
)
"""The real data set's columns, and `masks`."""

COUNTERPARTS: dict[str, tuple[str, ...]] = {
    "cone": ("bollard", "litter_bin", "flower_pot", "hydrant"),
    "drum": ("bollard", "litter_bin", "postbox"),
    "barricade": ("bench", "postbox", "autumn_bush", "flower_pot"),
    "block_barrier": ("bench", "postbox", "pumpkins", "flower_pot"),
    "work_sign": ("banner", "banner", "autumn_bush", "traffic_sign"),
    "worker": ("pedestrian", "banner", "postbox"),
    "work_truck": ("box_truck",),
    "work_truck_side": ("lorry_side", "bus"),
    "excavator": ("lorry_side", "bus", "tractor"),
    "roller": ("lorry_side", "box_truck"),
    "arrow_board": ("box_truck", "market_stall"),
}
"""What stands at a negative's spot in place of each roadwork object."""


@dataclass(frozen=True)
class Video:
    """What the frames of one video share. `number` from 0; `start` = index of its first photo."""

    number: int
    start: int
    frames: int
    split: str
    city: City
    site: bool
    clear: bool
    latitude: float
    longitude: float
    scene: str
    conditions: Conditions
    seed: int


@dataclass(frozen=True)
class Photo:
    """A drawn photo: `rgb` uint8 [720, 1280, 3]; `masks` uint8 [720, 1280], bit k = class k; its row without the two
    encoded pictures; `split`; `objects`: (name, class or None, height in px, visible px) of all that stands in it."""

    rgb: Image
    masks: Image
    row: dict[str, Any]
    split: str
    objects: tuple[tuple[str, int | None, float, int], ...]


def target_cities() -> tuple[str, ...]:
    """Names (as in `city_name`) of the cities where the embedded benchmark's model will serve."""
    return TARGET


def _stratum(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1) for `position`: every ten consecutive positions get one from each tenth, in random order."""
    block, slot = divmod(position, 10)
    rng = np.random.default_rng([seed, stream, block])
    return float((rng.permutation(10)[slot] + rng.random(10)[slot]) / 10)


def _split(seed: int, number: int) -> tuple[str, int]:
    """Split of a video and its position among the videos of that split."""
    block, slot = divmod(number, 10)
    order = np.random.default_rng([seed, 11, block]).permutation(10)
    chosen = sorted(int(i) for i in order[:TEST_PER_TEN])
    if slot in chosen:
        return "test", block * TEST_PER_TEN + chosen.index(slot)
    return "train", block * (10 - TEST_PER_TEN) + slot - sum(c < slot for c in chosen)


@lru_cache(maxsize=64)
def _video(number: int, seed: int) -> Video:
    split, position = _split(seed, number)
    stream = 20 if split == "train" else 30
    shares = np.array([c.train_share if split == "train" else c.test_share for c in CITIES])
    edges = np.cumsum(shares / shares.sum())
    place = int(np.searchsorted(edges, _stratum(seed, stream, position), "right"))
    city = CITIES[min(place, len(CITIES) - 1)]
    mean = sum(_LENGTHS) / len(_LENGTHS)
    rate = PRIOR[split] / (1 - _CLEAR / mean)
    site = _stratum(seed, stream + 1, position) < rate
    rng = np.random.default_rng([seed, 12, number])
    cycle, slot = divmod(number, len(_LENGTHS))
    odds = np.asarray(city.weather, np.float64)
    weather = WEATHERS[int(rng.choice(len(WEATHERS), p=odds / odds.sum()))]
    daytime = str(rng.choice(["Light", "Twilight", "Dark"], p=[0.78, 0.10, 0.12]))
    glare = weather in ("Sunny", "Partly Cloudy") and daytime != "Dark" and rng.random() < 0.2
    radius, angle = 9.0 * float(np.sqrt(rng.random())), 2 * float(np.pi) * rng.random()
    return Video(
        number, cycle * _STARTS[-1] + _STARTS[slot], _LENGTHS[slot], split, city, site, bool(rng.random() < _CLEAR),
        city.latitude + radius * float(np.sin(angle)) / 111.2,
        city.longitude + radius * float(np.cos(angle)) / (111.2 * float(np.cos(np.radians(city.latitude)))),
        str(rng.choice(["Urban", "Suburban", "Highway", "Rural", "Other"], p=[0.48, 0.26, 0.12, 0.10, 0.04])),
        Conditions(weather, daytime, bool(glare)), int(rng.integers(1 << 40)),
    )  # fmt: skip


def _locate(index: int) -> tuple[int, int]:
    """(video, frame) of a photo."""
    cycle, rest = divmod(index, _STARTS[-1])
    slot = int(np.searchsorted(_STARTS, rest, "right")) - 1
    return cycle * len(_LENGTHS) + slot, rest - _STARTS[slot]


def _thing(rng: np.random.Generator, kind: Kind, x: float, z: float) -> Thing:
    return Thing(kind, x, z, float(rng.uniform(*kind.height)), int(rng.integers(1 << 30)))


def _side(rng: np.random.Generator, place: Place, z: float) -> float:
    """A place beside the road that the camera sees at distance `z`."""
    reach = 0.62 * z
    x = place.road + float(rng.uniform(0.3, place.kerb))
    return float(rng.choice([-1, 1])) * min(x, reach)


def work_zone(rng: np.random.Generator, place: Place) -> list[Thing]:
    """Roadwork of one zone: a row of cones or drums, often barriers behind it, and signs, workers, machines around."""
    middle = float(rng.uniform(9.0, 16.0))
    across = float(rng.uniform(-0.9, 0.9)) * min(place.road, 0.5 * middle)
    plan = [("cone" if rng.random() < 0.7 else "drum", int(rng.integers(3, 7)))]
    if rng.random() < 0.7:
        plan.append(("barricade" if rng.random() < 0.6 else "block_barrier", int(rng.integers(1, 4))))
    plan += [("work_sign", 1)] * int(rng.integers(0, 3)) + [("worker", 1)] * int(rng.integers(0, 3))
    if rng.random() < 0.5:
        plan.append((str(rng.choice(["excavator", "work_truck", "work_truck_side", "roller", "arrow_board"])), 1))
    things: list[Thing] = []
    for name, count in plan:
        z, x = middle + float(rng.uniform(-3, 4)), across + float(rng.uniform(-3.4, 3.4))
        for k in range(count):
            depth = max(7.0, z + 1.4 * k)
            step = 0.9 if name in ("cone", "drum") else 1.6
            aside = float(np.clip(x + step * (k - count / 2), -0.62 * depth, 0.62 * depth))
            things.append(_thing(rng, ROADWORK[name], aside, depth))
    return things


def _counterpart(rng: np.random.Generator, thing: Thing, favourites: tuple[str, ...]) -> Thing:
    options = COUNTERPARTS[thing.kind.name]
    local = [name for name in options if name in favourites]
    name = str(rng.choice(local)) if local and rng.random() < 0.5 else str(rng.choice(options))
    return _thing(rng, LOOKALIKES[name], thing.x, thing.z)


@lru_cache(maxsize=2)
def _layout(number: int, seed: int) -> tuple[Place, list[Thing], list[Thing]]:
    """(place with everything ordinary in it, the work zone, what stands there in a negative)."""
    video = _video(number, seed)
    family = FAMILIES[video.city.family]
    place = build_place(video.seed, family, video.city.family, video.scene, video.conditions.daytime != "Light")
    rng = np.random.default_rng([video.seed, 3])
    names = list(LOOKALIKES)
    odds = np.array([3.0 if name in family.favourites else 1.0 for name in names])
    for name in rng.choice(names, p=odds / odds.sum(), size=int(rng.integers(1, 4))):
        kind, z = LOOKALIKES[str(name)], float(rng.uniform(9, 34))
        on_road = str(name) in ("box_truck", "bus", "tractor", "lorry_side")
        x = float(rng.uniform(1.2, place.road - 1)) if on_road else _side(rng, place, z)
        place.things.append(_thing(rng, kind, x, z + (8 if on_road else 0)))
    for _ in range(int(rng.integers(1, 5))):
        kind, z = (TRAFFIC["car_behind" if rng.random() < 0.6 else "car_side"], float(rng.uniform(13, 45)))
        x = float(rng.uniform(1.4, max(1.6, place.road - 1.2))) if kind.name == "car_behind" else _side(rng, place, z)
        place.things.append(_thing(rng, kind, x, z))
    zone = work_zone(rng, place)
    plain = [_counterpart(rng, thing, family.favourites) for thing in zone if rng.random() < 0.6]
    return place, zone, plain


def _paint(
    video: Video, frame_number: int, attempt: int, seed: int
) -> tuple[Frame, list[tuple[str, int | None, float, int]]]:
    place, zone, plain = _layout(video.number, seed)
    rng = np.random.default_rng([video.seed, 4, frame_number, attempt])
    horizon = 385 + float(np.random.default_rng([video.seed, 5]).uniform(0, 35)) + float(rng.normal(0, 3))
    camera = Camera(horizon, 640 + float(rng.normal(0, 22)), 0.7 * frame_number - 2.0 * attempt)
    weather = video.conditions
    frame = paint_street(camera, place, cloud=weather.cloud, snow=weather.weather == "Snow", haze=weather.haze,
                         visibility=weather.visibility)  # fmt: skip
    paint_wire_and_poles(frame, place)
    shows = video.site and not (video.clear and frame_number == 0)
    local = zone if shows else ([] if video.site else plain)
    painted = []
    for thing in sorted(place.things + local, key=lambda thing: -thing.z):
        size = 900.0 * thing.height / max(thing.z - camera.ahead, 0.1)
        pixels = paint_thing(frame, thing, video.city.family)
        if pixels and thing.kind.name not in ("tree", "lamp"):
            painted.append((thing.kind.name, thing.kind.mask_class, size, pixels))
    return frame, painted


_DESCRIPTIONS = (
    "Work zone with {things} {where}; traffic is {traffic}.",
    "There are {things} {where}. Drivers find the road {traffic}.",
    "{things} {where}, leaving the road {traffic}.",
)


def _describe(rng: np.random.Generator, masks: Image) -> tuple[str, str]:
    """(scene_description, travel_alteration) of a positive."""
    seen = int(np.bitwise_or.reduce(masks, axis=None))
    bits = [name for k, name in enumerate(MASK_CLASSES) if seen >> k & 1]
    things = ", ".join(f"{name}s" if name != "equipment" else name for name in bits)
    covered = np.count_nonzero(masks, axis=0)
    column = float(covered @ np.arange(len(covered)) / covered.sum())
    where = "on the left" if column < 480 else "on the right" if column > 800 else "ahead"
    traffic = str(rng.choice(["Partially Blocked", "Lane Shift", "Fully Blocked", "None"], p=[0.6, 0.2, 0.1, 0.1]))
    told = traffic.lower() if traffic != "None" else "open"
    text = str(rng.choice(_DESCRIPTIONS)).format(things=things, where=where, traffic=told)
    return text[0].upper() + text[1:], str([traffic])


def _row(video: Video, index: int, frame_number: int, masks: Image) -> dict[str, Any]:
    rng = np.random.default_rng([video.seed, 6, frame_number])
    label = int(masks.any())
    description, alteration = _describe(rng, masks) if label else (None, None)
    shared = np.random.default_rng([video.seed, 7])
    has_gps, knows_weather, knows_day, knows_scene = (bool(b) for b in shared.random(4) > (0.05, 0.06, 0.03, 0.03))
    along = frame_number * 4e-5
    tags = [video.conditions.weather] if knows_weather else ["Unknown"]
    return {
        "id": index,
        "width": masks.shape[1],
        "height": masks.shape[0],
        "license": 1,
        "flickr_url": None,
        "coco_url": None,
        "date_captured": 0,
        "gps": str([round(float(video.latitude + along), 8), round(float(video.longitude + along), 8)])
        if has_gps
        else None,
        "city_name": video.city.name,
        "scene_description": description,
        "video_info.frame_id": f"{frame_number * 30:06d}",
        "video_info.seq_id": video.number,
        "video_info.vid_id": f"{video.city.name}_{video.seed:010x}",
        "scene_level_tags.daytime": video.conditions.daytime if knows_day else "Unknown",
        "scene_level_tags.scene_environment": video.scene if knows_scene else "Unknown",
        "scene_level_tags.travel_alteration": alteration,
        "scene_level_tags.weather": str(tags),
        "label": label,
    }


def draw(index: int, seed: int = 0) -> Photo:
    """Photo number `index` (from 0; UserError below) of the benchmark with this `seed`. About 0.1 s of one core."""
    if index < 0:
        raise UserError(f"the street benchmark has no photo {index}: photos are numbered from 0")
    number, frame_number = _locate(index)
    video = _video(number, seed)
    shows = video.site and not (video.clear and frame_number == 0)
    for attempt in range(6):
        frame, painted = _paint(video, frame_number, attempt, seed)
        # a zone hidden behind a lorry is looked at from further back
        if not shows or int(np.count_nonzero(frame.masks)) >= _MIN_PIXELS:
            break
    rgb = expose(frame, video.conditions, np.random.default_rng([video.seed, 8, frame_number]))
    return Photo(rgb, frame.masks, _row(video, index, frame_number, frame.masks), video.split, tuple(painted))


def _encoded(job: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    index, seed = job
    cv2.setNumThreads(1)
    photo = draw(index, seed)
    bgr = cv2.cvtColor(photo.rgb, cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    _, png = cv2.imencode(".png", photo.masks, _PNG)
    name = f"street_{seed}_{index:07d}.jpg"
    return photo.split, {**photo.row, "image": {"bytes": jpeg.tobytes(), "path": name}, "masks": png.tobytes()}


def write_parquet(
    out_dir: str | Path,
    n: int,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write photos 0..n-1 as `train-*.parquet` and `test-*.parquet`; return the files.

    `processes`: how many draw at a time (default: one per core); the files are the same for any number.
    `progress(done, n)` is called as rows arrive. About 70 % of the photos are training photos, by whole videos.
    UserError for fewer than 24 photos.
    """
    if n < 24:
        raise UserError(f"the street benchmark needs at least 24 photos to have both splits, got {n}: ask for more")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plan = [_split(seed, _locate(i)[0])[0] for i in range(n)]
    totals = {split: -(-plan.count(split) // _ROWS_PER_FILE) for split in ("train", "test")}
    pending: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    written: dict[str, list[Path]] = {"train": [], "test": []}

    def flush(split: str) -> None:
        path = folder / f"{split}-{len(written[split]):05d}-of-{totals[split]:05d}.parquet"
        part = path.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist(pending[split], schema=SCHEMA), part, row_group_size=100)
        part.replace(path)
        written[split].append(path)
        pending[split] = []

    jobs = [(i, seed) for i in range(n)]
    workers = min(processes or multiprocessing.cpu_count(), n)
    with multiprocessing.get_context("spawn").Pool(workers, keep_freed_memory) as pool:
        for done, (split, row) in enumerate(pool.imap(_encoded, jobs, chunksize=12), 1):
            pending[split].append(row)
            if len(pending[split]) == _ROWS_PER_FILE:
                flush(split)
            if progress is not None:
                progress(done, n)
    for split, rows in pending.items():
        if rows:
            flush(split)
    return written["train"] + written["test"]
