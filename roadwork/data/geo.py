"""Distance on the globe, GPS weights by distance to a target region, and how well the draws cover it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roadwork.errors import UserError

EARTH_RADIUS_KM = 6371.0088  # mean radius R1 of the WGS-84 ellipsoid


@dataclass(frozen=True)
class Brackets:
    """weights[i] holds up to and including max_km[i]; weights[-1] beyond the last."""

    max_km: tuple[float, ...] = (50.0, 200.0, 500.0)
    weights: tuple[float, ...] = (5.0, 2.5, 1.0, 0.3)

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.max_km) + 1 or list(self.max_km) != sorted(set(self.max_km)):
            raise UserError(
                f"brackets: {len(self.max_km)} rising distances need {len(self.max_km) + 1} weights; "
                f"given {list(self.max_km)} km and weights {list(self.weights)}"
            )
        if not all(km >= 0 for km in self.max_km):
            raise UserError(f"brackets: distances must be 0 km or more; given {list(self.max_km)}")
        if not all(np.isfinite(w) and w > 0 for w in self.weights):
            raise UserError(f"brackets: weights must be finite and above 0; given {list(self.weights)}")


DEFAULT = Brackets()
COVERAGE_TARGETS = {"within_50_km": 0.70, "within_100_km": 0.85, "mean_km": 150.0}


def usable(latlon: np.ndarray) -> np.ndarray:
    """bool [N]: finite, in range and not exactly (0, 0), which cameras write when they have no fix."""
    latlon = _pairs(latlon, "latlon")
    with np.errstate(invalid="ignore"):
        inside = (np.abs(latlon[:, 0]) <= 90.0) & (np.abs(latlon[:, 1]) <= 180.0)
    known: np.ndarray = np.isfinite(latlon).all(axis=1) & inside & (latlon != 0.0).any(axis=1)
    return known


def unit_sphere(latlon: np.ndarray) -> np.ndarray:
    """Degrees [N, 2] to unit vectors float64 [N, 3]."""
    lat, lon = np.radians(_pairs(latlon, "latlon")).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def from_sphere(xyz: np.ndarray) -> np.ndarray:
    """Vectors [N, 3] of any length to degrees [N, 2]."""
    latitude, longitude = np.arctan2(xyz[:, 2], np.hypot(xyz[:, 0], xyz[:, 1])), np.arctan2(xyz[:, 1], xyz[:, 0])
    latlon: np.ndarray = np.degrees(np.stack([latitude, longitude], axis=1))
    return latlon


def haversine_km(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Great-circle distance in km between degrees [..., 2] and [..., 2], broadcast.

    Haversine formula (Sinnott 1984) on the mean sphere: within 0.6 % of the WGS-84 geodesic.
    """
    lat1, lon1 = (
        np.radians(np.asarray(a, dtype=np.float64))[..., 0],
        np.radians(np.asarray(a, dtype=np.float64))[..., 1],
    )
    lat2, lon2 = (
        np.radians(np.asarray(b, dtype=np.float64))[..., 0],
        np.radians(np.asarray(b, dtype=np.float64))[..., 1],
    )
    h = np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2
    distance: np.ndarray = 2.0 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(h, 0.0, 1.0)))
    return distance


def nearest_km(latlon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance in km from each usable [N, 2] to the nearest of [M, 2] (chord search, exact); NaN if unusable."""
    from scipy.spatial import cKDTree  # here, so that encoding processes need not load it

    latlon, points = _pairs(latlon, "latlon"), _pairs(points, "points")
    distance = np.full(len(latlon), np.nan)
    keep = usable(latlon)
    if keep.any() and len(points):
        _, nearest = cKDTree(unit_sphere(points)).query(unit_sphere(latlon[keep]))
        distance[keep] = haversine_km(latlon[keep], points[nearest])
    return distance


def share_near_only(points: np.ndarray, held: np.ndarray, known: np.ndarray, metres: float = 100.0) -> float:
    """Share of points [M, 2] within `metres` of a place of `held` and of none of `known`; unusable places of both are
    left out, and an unusable point is near nothing."""

    def near(places: np.ndarray) -> np.ndarray:
        places = _pairs(places, "places")
        return nearest_km(points, places[usable(places)]) <= metres / 1000.0

    return float((near(held) & ~near(known)).mean()) if len(points) else 0.0


def clusters(target_latlon: np.ndarray, n_clusters: int = 5) -> np.ndarray:
    """Centres in degrees [K, 2] of the usable target points: k-means of unit vectors, centres back on the sphere.

    K is at most the number of different points; an empty or unusable target gives [0, 2]. target_latlon: degrees
    [M, 2]. UserError for less than one cluster.
    """
    from sklearn.cluster import KMeans

    if n_clusters < 1:
        raise UserError(f"clusters: at least 1 is needed; given {n_clusters}")
    target_latlon = _pairs(target_latlon, "target_latlon")
    points = target_latlon[usable(target_latlon)]
    if len(points) == 0:
        return np.zeros((0, 2))
    unique = np.unique(points, axis=0)
    if len(unique) <= n_clusters:
        return unique
    xyz = unit_sphere(points)
    centres = KMeans(n_clusters=n_clusters, init="k-means++", n_init=10, random_state=0).fit(xyz).cluster_centers_
    # Points all around the globe average to the origin, which is nowhere: such a centre becomes its first point.
    length = np.linalg.norm(centres, axis=1, keepdims=True)
    fallback = (
        xyz[np.argmin(((xyz[None] - centres[:, None]) ** 2).sum(-1), axis=1)] if (length < 1e-9).any() else centres
    )
    return from_sphere(np.where(length < 1e-9, fallback, centres / np.maximum(length, 1e-9)))


def gps_weights(
    latlon: np.ndarray, target_latlon: np.ndarray, n_clusters: int = 5, brackets: Brackets = DEFAULT
) -> np.ndarray:
    """Weight float64 [N] of each photo by its distance to the nearest cluster of the target region.

    latlon [N, 2] and target_latlon [M, 2] in degrees. A missing, impossible or exactly (0, 0) coordinate weighs 1,
    as does everything where the target has no usable point.
    """
    return weights_to_centres(latlon, clusters(target_latlon, n_clusters), brackets)


def weights_to_centres(latlon: np.ndarray, centres: np.ndarray, brackets: Brackets = DEFAULT) -> np.ndarray:
    """As `gps_weights`, for centres [K, 2] that are already known."""
    latlon = _pairs(latlon, "latlon")
    weights = np.ones(len(latlon))
    if len(centres):
        distance = nearest_km(latlon, centres)
        keep = ~np.isnan(distance)
        bracket = np.searchsorted(np.asarray(brackets.max_km), distance[keep], side="left")
        weights[keep] = np.asarray(brackets.weights, dtype=np.float64)[bracket]
    return weights


def balance_classes(weights: np.ndarray, labels: np.ndarray, mode: str = "keep") -> np.ndarray:
    """Scale the weights per class so that weighting by distance does not move the class prior.

    weights [N] -> float64 [N]; labels int [N], -1 unknown. `none`: as they are; `keep`: the draws have the photos'
    prior (mean weight 1 in each class); `equal`: draws half and half. UserError for another mode.
    """
    if mode not in ("none", "keep", "equal"):
        raise UserError(f"class balance: one of none, keep, equal; given {mode!r}")
    weights = np.array(weights, dtype=np.float64)
    if mode == "none":
        return weights
    present = [c for c in (-1, 0, 1) if (labels == c).any()]
    known = [c for c in present if c >= 0]
    for c in present:
        chosen = labels == c
        weights[chosen] /= weights[chosen].mean()
        if mode == "equal" and c >= 0:
            weights[chosen] *= (labels >= 0).sum() / (len(known) * chosen.sum())
    return weights


def effective_sample_size(weights: np.ndarray) -> float:
    """Kish 1965: (sum w)^2 / sum w^2 of weights [N], in photos; 0 where they sum to 0."""
    weights = np.asarray(weights, dtype=np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.sum() > 0 else 0.0


def coverage(latlon: np.ndarray, weights: np.ndarray, target: np.ndarray) -> dict[str, float | int | bool | None]:
    """How near the DRAWS (not the photos) are to the target points [M, 2].

    Shares are of the draws with a usable coordinate; `unknown_draws` is the share without. The three targets are
    0.70 within 50 km, 0.85 within 100 km and a mean of 150 km.
    """
    latlon, target = _pairs(latlon, "latlon"), _pairs(target, "target")
    target = target[usable(target)]
    weights = np.asarray(weights, dtype=np.float64)
    distance = nearest_km(latlon, target)
    known = ~np.isnan(distance)
    total, mass = float(weights.sum()), float(weights[known].sum())
    report: dict[str, float | int | bool | None] = {
        "photos": len(latlon),
        "without_coordinate": int((~usable(latlon)).sum()),
        "effective_sample_size": effective_sample_size(weights),
        "unknown_draws": (total - mass) / total if total else None,
    }
    if mass <= 0 or not len(target):
        return report | {"within_50_km": None, "within_100_km": None, "mean_km": None, "targets_met": None}
    near = {f"within_{km}_km": float(weights[known & (distance <= km)].sum() / mass) for km in (50, 100)}
    mean = float((weights[known] * distance[known]).sum() / mass)
    met = all(near[name] >= COVERAGE_TARGETS[name] for name in near) and mean <= COVERAGE_TARGETS["mean_km"]
    return report | near | {"mean_km": mean, "targets_met": met}


def read_target(path: str | Path) -> np.ndarray:
    """Coordinates [M, 2] of a CSV with the header `latitude,longitude`. Raises UserError naming the line at fault."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"target region: no file {path}; give a CSV with the header latitude,longitude")
    try:
        rows, lines = _target_rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"target region {path}: not a CSV in UTF-8 ({error})") from error
    points = np.asarray(rows, dtype=np.float64).reshape(-1, 2)
    if not usable(points).all():
        raise UserError(f"target region {path}: line {lines[int(np.argmin(usable(points)))]} is no place on Earth")
    if not len(points):
        raise UserError(f"target region {path}: no coordinate below the header")
    return points


def _target_rows(path: Path) -> tuple[list[tuple[float, float]], list[int]]:
    """The pairs of a target CSV, and the line of the file on which each stands."""
    rows: list[tuple[float, float]] = []
    lines: list[int] = []
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        names = [name.strip().lower() for name in reader.fieldnames or []]
        if "latitude" not in names or "longitude" not in names:
            raise UserError(
                f"target region {path}: the header must hold latitude,longitude; it holds {','.join(names)}"
            )
        reader.fieldnames = names
        for row in reader:
            lines.append(reader.line_num)
            try:
                rows.append((float(row["latitude"]), float(row["longitude"])))
            except (TypeError, ValueError):
                raise UserError(f"target region {path}: line {lines[-1]} holds no two numbers of degrees") from None
    return rows, lines


def _pairs(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        return values.reshape(0, 2)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"{name} must be [N, 2] degrees (latitude, longitude); given shape {list(values.shape)}")
    return values
