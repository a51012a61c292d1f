"""What will be built: every row judged, split, weighted and given its place in a shard, before a pixel is decoded."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from roadwork.data import geo, splits
from roadwork.data.masks import MaskFolder
from roadwork.data.record import Record, Rejected, parse_row
from roadwork.data.sample import Row, sample
from roadwork.data.sources import Ref, Source
from roadwork.errors import UserError

ENCODER = 4
"""Raised whenever the same photo would be encoded to other bytes or get another hash: finished shards are then built anew."""
_MOST_PER_SHARD, _FEWEST_PER_SHARD, _SHARDS_PER_SPLIT = 256, 32, 16


@dataclass
class BuildOptions:
    """What `shards.build` can be told; the command line's help is made from these."""

    source: str
    out: str
    target_gps: str = ""
    target_cities: list[str] = field(default_factory=list)
    view_size: int = 512
    max_views: int = 12
    samples_per_shard: int = 0
    processes: int = 0
    seed: int = 0
    val_fraction: float = 0.15
    test_fraction: float = 0.0
    masks: str = ""
    text_encoder: str = ""
    quality: int = 90
    clusters: int = 5
    brackets: geo.Brackets = geo.DEFAULT
    class_balance: str = "none"
    weight_cap: float = 0.0
    group_near_duplicates: bool = False
    shard_range: tuple[int, int] | None = None
    max_photos: int = 0

    def encoding(self) -> dict[str, Any]:
        """The part that decides the bytes of an encoded photo."""
        return {"encoder": ENCODER} | {
            name: getattr(self, name) for name in ("view_size", "max_views", "quality", "masks", "text_encoder")
        }


@dataclass
class Entry:
    """One photo of the plan."""

    ref: Ref
    record: Record
    split: str
    group: str
    key: str = ""
    weight: float = 1.0

    def latlon(self) -> tuple[float, float]:
        latitude, longitude = self.record.latitude, self.record.longitude
        return (math.nan if latitude is None else latitude, math.nan if longitude is None else longitude)


@dataclass
class Rejection:
    """A row that is not in the shards, and why."""

    id: str
    reason: str
    split: str | None = None

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass
class ShardPlan:
    """The photos of one shard; `fingerprint` names its content before it exists."""

    name: str
    entries: list[Entry]
    fingerprint: str


@dataclass
class Target:
    """The target region: points [M, 2], their cluster centres [K, 2], and where they come from."""

    points: np.ndarray
    centres: np.ndarray
    description: dict[str, Any]


@dataclass
class Plan:
    """Everything known before encoding."""

    entries: list[Entry]
    shards: list[ShardPlan]
    rejected: list[Rejection]
    rows_read: int
    left_out: int
    """Rows of the source that --max-photos left out."""
    target: Target

    def fingerprint(self) -> str:
        """SHA-256 of the whole plan: equal plans give equal folders."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.fingerprint}\n".encode())
        for line in self.rejected:
            digest.update(line.line().encode())
        digest.update(json.dumps([self.rows_read, self.target.description], sort_keys=True).encode())
        return digest.hexdigest()


def make_plan(source: Source, options: BuildOptions) -> Plan:
    """Scan the source's metadata and decide everything that does not need pixels.

    UserError where no row can be used, or an option does not fit what was found.
    """
    rows, left_out = sample(source.rows(), options.max_photos)
    refs, records, rejected, rows_read = scan(rows)
    if not records:
        raise UserError(
            f"source {source.name}: none of its {rows_read} rows can be used; first reason: {_first(rejected)}"
        )
    groups = [splits.group_of(record) for record in records]
    if options.group_near_duplicates:
        from roadwork.data.duplicates import merge_groups_of_duplicates

        groups = merge_groups_of_duplicates(source, refs, groups, options.processes)
    assigned = splits.assign_splits(records, groups, options.val_fraction, options.test_fraction, options.seed)
    entries = []
    asked: set[str] = set()
    for ref, record, group, split, reason in zip(refs, records, groups, assigned.split, assigned.reason, strict=True):
        if split == "predict":
            # Predictions are told apart by id alone, and two published splits may hold a photo of the same number.
            split, reason = (None, "duplicate_id_in_predict") if record.id in asked else (split, "")
            asked.add(record.id)
        if split is None:
            rejected.append(Rejection(record.id, reason, record.split or "train"))
        else:
            entries.append(Entry(ref, record, split, group))
    number: Counter[str] = Counter()
    for entry in entries:
        entry.key = f"{entry.split}-{number[entry.split]:09d}"
        number[entry.split] += 1
    target = weigh(entries, source, options)
    return Plan(entries, cut_shards(entries, source, options), rejected, rows_read, left_out, target)


def _first(rejected: Sequence[Rejection]) -> str:
    return f"{rejected[0].reason} (id {repr(rejected[0].id)[1:-1]})" if rejected else "there are none"


def scan(lines: Iterable[Row]) -> tuple[list[Ref], list[Record], list[Rejection], int]:
    """Parse every row's metadata. An id that appears again within the same published split is rejected."""
    refs: list[Ref] = []
    records: list[Record] = []
    rejected: list[Rejection] = []
    seen: set[tuple[str | None, str]] = set()
    rows = 0
    for ref, row in lines:
        rows += 1
        split = row.get("split")
        try:
            record = parse_row(row).but(split=split)
            if (split, record.id) in seen:
                raise Rejected("duplicate_id")
        except Rejected as error:
            name = row.get("id")
            rejected.append(Rejection(str(name) if name is not None else f"row {ref}", error.reason, split))
            continue
        seen.add((split, record.id))
        refs.append(ref)
        records.append(record)
    times = Counter(name for _, name in seen)
    for record in records:
        if times[record.id] > 1:  # the same number in train and test: two photos, told apart by their split only
            record.extra["ambiguous_id"] = True
    return refs, records, rejected, rows


# ---------------------------------------------------------------------------------------------- weights


def weigh(entries: Sequence[Entry], source: Source, options: BuildOptions) -> Target:
    """Set every entry's weight; returns the target region that it follows from."""
    points, description = target_points(entries, source, options)
    centres = geo.clusters(points, options.clusters)
    weights = geo.weights_to_centres(latlon_of(entries), centres, options.brackets)
    train = np.array([entry.split == "train" for entry in entries])
    weights[train] = settle(weights[train], labels_of(entries)[train], options.class_balance, options.weight_cap)
    for entry, weight in zip(entries, weights, strict=True):
        entry.weight = float(weight)
    return Target(points, centres, description)


def latlon_of(entries: Sequence[Entry]) -> np.ndarray:
    """Degrees [N, 2], NaN where not known."""
    return np.array([entry.latlon() for entry in entries]).reshape(-1, 2)


def labels_of(entries: Sequence[Entry]) -> np.ndarray:
    """int [N], -1 where not known."""
    return np.array([-1 if entry.record.label is None else entry.record.label for entry in entries], dtype=np.int64)


def settle(weights: np.ndarray, labels: np.ndarray, class_balance: str, cap: float) -> np.ndarray:
    """Class balance, then the cap, in that order: weights [N] -> [N]; labels int [N], -1 unknown; cap 0: none.

    UserError for a negative cap, or a balance that `balance_classes` does not know.
    """
    if cap < 0 or math.isnan(cap):
        raise UserError(f"--weight-cap must be above 0, or 0 for none; given {cap}")
    weights = geo.balance_classes(weights, labels, class_balance)
    return np.minimum(weights, cap) if cap else weights


def target_points(entries: Sequence[Entry], source: Source, options: BuildOptions) -> tuple[np.ndarray, dict[str, Any]]:
    """Degrees [M, 2] of the target region and how they were found; [0, 2] for no target.

    UserError for both a file and cities, a file that is no such CSV, or a city that nothing has coordinates of.
    """
    if options.target_gps and options.target_cities:
        raise UserError("--target-gps and --target-cities are two ways to say one thing; give one of them")
    if options.target_gps:
        found = geo.read_target(options.target_gps)
        test, train = (latlon_of([e for e in entries if e.split in side]) for side in (("test",), ("train", "val")))
        return found, describe_file(options.target_gps, found, test, train)
    if not options.target_cities:
        return np.zeros((0, 2)), {"kind": "no target", "transductive": False}
    points, from_test, centres = [], [], []
    for city in options.target_cities:
        found, where = _city_points(city, entries, source)
        points.append(found)
        if where == "test":
            from_test.append(city)
        elif where == "source":
            centres.append(city)
    return np.concatenate(points), {
        "kind": "cities",
        "cities": list(options.target_cities),
        "transductive": bool(from_test),
        "cities_from_test": from_test,
        "cities_from_source": centres,
    }


def describe_file(file: str, points: np.ndarray, test: np.ndarray, train: np.ndarray) -> dict[str, Any]:
    """The manifest's words on a target of places [M, 2]: transductive where some are places [N, 2] of test alone."""
    share = geo.share_near_only(points, test, train)
    said = {"kind": "file", "file": file, "transductive": share > 0}
    return said | ({"share_from_test": round(share, 6)} if share else {})


def _city_points(city: str, entries: Sequence[Entry], source: Source) -> tuple[np.ndarray, str]:
    """Coordinates of a city: from photos outside test, else from the source's own list, else from test."""
    wanted = city.strip().lower()
    places: dict[str, list[tuple[float, float]]] = {"train": [], "test": []}
    for entry in entries:
        if entry.record.city.lower() == wanted and entry.record.latitude is not None:
            places["test" if entry.split == "test" else "train"].append(entry.latlon())
    if places["train"]:
        return np.array(places["train"]), "train"
    known = {name.lower(): point for name, point in known_cities(source).items()}
    if wanted in known:
        return np.array([known[wanted]]), "source"
    if places["test"]:
        return np.array(places["test"]), "test"
    names = sorted({entry.record.city for entry in entries if entry.record.city} | set(known_cities(source)))
    raise UserError(
        f"--target-cities: no photo with coordinates is in {city!r}; cities: {', '.join(names[:20]) or 'none named'}"
    )


def known_cities(source: Source) -> dict[str, tuple[float, float]]:
    """City centres that the source itself publishes: the embedded benchmark's."""
    if not source.name.startswith("street"):
        return {}
    from roadwork.data.street_cities import CITIES

    return {city.name: (city.latitude, city.longitude) for city in CITIES}


def describe_weights(
    latlon: np.ndarray,
    weights: np.ndarray,
    labels: np.ndarray,
    target: Target,
    brackets: geo.Brackets,
    class_balance: str,
    weight_cap: float,
) -> dict[str, Any]:
    """The manifest's words on the weights of the training photos: target, clusters, brackets, coverage, class prior.

    latlon: degrees [N, 2]; weights [N], as they are drawn by; labels int [N], -1 unknown.
    """
    known = labels >= 0
    uniform = np.ones(len(weights))

    def prior(w: np.ndarray) -> float | None:
        return float(w[known & (labels == 1)].sum() / w[known].sum()) if known.any() and w[known].sum() > 0 else None

    values, counts = np.unique(np.round(weights, 6), return_counts=True)
    return {
        "target": target.description | {"points": len(target.points)},
        "clusters": [[round(float(a), 6), round(float(b), 6)] for a, b in target.centres],
        "brackets": {"max_km": list(brackets.max_km), "weights": list(brackets.weights)},
        "class_balance": class_balance,
        "weight_cap": weight_cap,
        "weights": {f"{v:g}": int(c) for v, c in zip(values, counts, strict=True)} if len(values) <= 20 else None,
        "coverage": geo.coverage(latlon, weights, target.points),
        "coverage_unweighted": geo.coverage(latlon, uniform, target.points),
        "coverage_targets": geo.COVERAGE_TARGETS,
        "class_prior": {"photos": prior(uniform), "draws": prior(weights)},
    }


# ---------------------------------------------------------------------------------------------- shards


def cut_shards(entries: Sequence[Entry], source: Source, options: BuildOptions) -> list[ShardPlan]:
    """Photos in source order, each split cut into shards of nearly the same size.

    The cut depends on the number of photos only, never on that of processes. UserError for a negative size.
    """
    if options.samples_per_shard < 0:
        raise UserError(
            f"--samples-per-shard must be 1 or more, or 0 for a size by itself; given {options.samples_per_shard}"
        )
    shards = []
    for split in ("train", "val", "test", "predict"):
        chosen = [entry for entry in entries if entry.split == split]
        if not chosen:
            continue
        size = options.samples_per_shard or min(
            max(math.ceil(len(chosen) / _SHARDS_PER_SPLIT), _FEWEST_PER_SHARD), _MOST_PER_SHARD
        )
        count = math.ceil(len(chosen) / size)
        edges = [len(chosen) * i // count for i in range(count + 1)]
        for number in range(count):
            part = chosen[edges[number] : edges[number + 1]]
            shards.append(ShardPlan(f"{split}-{number:06d}.tar", part, fingerprint(part, source, options)))
    return shards


def fingerprint(entries: Sequence[Entry], source: Source, options: BuildOptions) -> str:
    """SHA-256 of all that decides a shard's bytes: encoding options, metadata, identity of photos and masks."""
    digest = hashlib.sha256(json.dumps(options.encoding(), sort_keys=True).encode())
    folder = MaskFolder(options.masks) if options.masks else None
    for entry in entries:
        masks = folder.stamp(entry.record.id) if folder else ""
        facts = [entry.key, meta_of(entry), list(entry.ref), source.stamp(entry.ref), masks]
        digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def meta_of(entry: Entry) -> dict[str, Any]:
    """The metadata of `<key>.json` that is known before the pixels are."""
    record = entry.record
    return {
        "id": record.id,
        "label": record.label,
        "latitude": record.latitude,
        "longitude": record.longitude,
        "gps_weight": entry.weight,
        "group": entry.group,
        "weather": record.weather,
        "daytime": record.daytime,
        "scene": record.scene,
        "city": record.city,
        "description": record.description,
    }
