"""Where it goes wrong: one pass over collected predictions joined with the shard index. Everything is JSON-able."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from roadwork.errors import UserError
from roadwork.evaluation import metrics

Array = npt.NDArray[Any]
DISTANCE_BANDS_KM = (50.0, 200.0, 500.0)
SIZE_BANDS = (0.001, 0.005, 0.02)
"""Upper ends of the bands of the share of the photo that roadwork objects cover."""
EARTH_RADIUS_KM = 6371.0088
TAGS = ("weather", "daytime", "scene")


@dataclass
class Joined:
    """Labelled photos that have a prediction. rows: positions in the index; the counts say what was left out."""

    index: Any
    rows: Array
    label: Array
    probability: Array
    group: Array
    unlabelled: int = 0
    missing: list[str] = field(default_factory=list)

    @property
    def id(self) -> Array:
        """Ids [n] of the joined photos."""
        return np.asarray(self.index.names(self.rows))


def join(index: Any, predictions: Mapping[str, float]) -> Joined:
    """Predictions by id, joined with an index (columns id, label, group).

    Unlabelled photos are left out and counted; labelled ones without a prediction are named in `missing`. Raises
    UserError where a prediction's id is in no photo of the index: then the file belongs to another split or data set.
    """
    ids = [str(i) for i in index.id]
    unknown = set(predictions) - set(ids)
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(predictions)} predictions name photos that the split does not hold, for example "
            f"{min(unknown)!r}; give the split that was predicted (--predict.split) or run launch/predict.py again"
        )
    labels = np.asarray(index.label)
    labelled = np.isin(labels, (0, 1))
    there = np.asarray([i in predictions for i in ids], dtype=bool)
    rows = np.flatnonzero(labelled & there)
    return Joined(
        index=index,
        rows=rows,
        label=labels[rows].astype(np.int64),
        probability=np.asarray([predictions[ids[r]] for r in rows], dtype=np.float64),
        group=np.asarray(index.group)[rows],
        unlabelled=int((~labelled & there).sum()),
        missing=[ids[r] for r in np.flatnonzero(labelled & ~there)],
    )


def great_circle_km(latitude: Array, longitude: Array, points: Array) -> Array:
    """Distances [N, K] in km from N places to points [K, 2] (degrees), on the sphere; nan where a place is unknown."""
    a, o = np.radians(np.asarray(latitude, dtype=np.float64)), np.radians(np.asarray(longitude, dtype=np.float64))
    b, p = np.radians(np.asarray(points, dtype=np.float64).reshape(-1, 2)).T
    h = np.sin((a[:, None] - b) / 2) ** 2 + np.cos(a)[:, None] * np.cos(b) * np.sin((o[:, None] - p) / 2) ** 2
    distance: Array = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(h, 0, 1)))
    return distance


def _bands(values: Array, ends: Sequence[float], form: Any, unknown: str) -> list[str]:
    names = [f"below {form(ends[0])}"]
    names += [f"{form(a)} to {form(b)}" for a, b in zip(ends[:-1], ends[1:], strict=True)] + [f"over {form(ends[-1])}"]
    return [unknown if not math.isfinite(v) else names[int(np.searchsorted(ends, v, side="right"))] for v in values]


def object_share(index: Any, row: int) -> float:
    """Share of the photo (its whole-photo view) that any roadwork object covers; nan where the photo has no masks."""
    if not np.asarray(index.masks_valid[row]).any():
        return math.nan
    try:
        masks = index.read_masks(int(row))
    except (OSError, ValueError):  # a damaged sample has no size; the loader has already named it
        return math.nan
    return math.nan if masks is None else covered(np.asarray(masks[0]))


def covered(masks: Array) -> float:
    """Share of the pixels of one view's masks [classes, s, s] that any class covers."""
    return float(masks.any(axis=0).mean())


def slices(joined: Joined, names: Mapping[str, Sequence[str]], centres: Any = ()) -> Iterator[tuple[str, Array, str]]:
    """(field, value of each photo [n] as text, note) for every breakdown that the index can give."""
    index, rows = joined.index, joined.rows
    for tag in TAGS:
        codes = np.asarray(getattr(index, tag))[rows]
        words = list(names.get(tag, ()))
        yield tag, np.asarray([_word(words, int(code)) for code in codes], dtype=object), ""
    yield "city", np.asarray([str(c) or "unknown" for c in np.asarray(index.city)[rows]], dtype=object), ""
    points = np.asarray(centres, dtype=np.float64).reshape(-1, 2)
    if len(points) and len(rows):
        distance = great_circle_km(np.asarray(index.latitude)[rows], np.asarray(index.longitude)[rows], points)
        known = np.isfinite(distance).all(axis=1)
        nearest = np.where(known, np.argmin(np.where(np.isfinite(distance), distance, np.inf), axis=1), -1)
        named = [f"{k}: {points[k, 0]:.2f}, {points[k, 1]:.2f}" if k >= 0 else "unknown" for k in nearest]
        yield "gps_cluster", np.asarray(named, dtype=object), "nearest centre of the target region"
        bands = _bands(distance.min(axis=1), DISTANCE_BANDS_KM, lambda v: f"{v:g} km", "unknown")
        yield "distance", np.asarray(bands, dtype=object), "to the nearest centre of the target region"


def _word(words: Sequence[str], code: int) -> str:
    if code < 0:
        return "unknown"
    return words[code] if code < len(words) else f"class {code}"


def analyse(
    joined: Joined, names: Mapping[str, Sequence[str]] | None = None, centres: Any = (), n: int = 500, seed: int = 0,
    worst: int = 12, shares: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Breakdowns, confusion table and worst errors.

    names: words of the codes of weather, daytime and scene; centres [K, 2]: of the target region; n: bootstrap
    resamples per row; worst: how many false positives and false negatives are named, worst first; shares:
    `object_share` of each photo by id where the masks have been read already. An empty or one-class set gives a
    stated degenerate result.
    """
    label, probability = joined.label, joined.probability
    table = metrics.confusion(label, probability)
    result: dict[str, Any] = {
        "n": len(label),
        "unlabelled": joined.unlabelled,
        "missing": joined.missing[:100],
        "missing_count": len(joined.missing),
        "classes": sorted(int(c) for c in np.unique(label)),
        "confusion": table.tolist(),
        "breakdowns": [],
        "worst": {"false_positives": [], "false_negatives": []},
    }
    for name, values, note in slices(joined, names or {}, centres):
        rows = [_row(joined, value, values == value, n, seed) for value in sorted(set(values))]
        result["breakdowns"].append({"field": name, "note": note, "rows": sorted(rows, key=lambda r: -r["n"])})
    if len(label):
        result["breakdowns"].append(_by_size(joined, shares, n, seed))
    wrong = (probability > 0.5) != (label == 1)
    for kind, positive in (("false_positives", 0), ("false_negatives", 1)):
        picked = np.flatnonzero(wrong & (label == positive))
        order = np.argsort(-np.abs(probability[picked] - label[picked]), kind="stable")[:worst]
        result["worst"][kind] = [_error(joined, int(picked[k]), names or {}) for k in order]
    return result


def _row(joined: Joined, value: str, chosen: Array, n: int, seed: int) -> dict[str, Any]:
    label, probability, group = (v[chosen] for v in (joined.label, joined.probability, joined.group))
    table = metrics.confusion(label, probability)
    low, high = metrics.group_bootstrap(label, probability, group, "mcc", n, seed)
    return {
        "value": value,
        "n": int(chosen.sum()),
        "positives": int(label.sum()),
        "groups": len(np.unique(metrics.group_codes(group, len(label)))),
        **metrics.table_metrics(table),
        "mcc_interval": None if math.isnan(low) else [low, high],
        "one_class": len(np.unique(label)) < 2,
    }


def _by_size(joined: Joined, shares: Mapping[str, float] | None, n: int, seed: int) -> dict[str, Any]:
    """Objects exist on positives only, so each band's positives are scored against ALL negatives."""
    share = np.full(len(joined.rows), math.nan)
    for k in np.flatnonzero(joined.label == 1):
        row = int(joined.rows[k])
        share[k] = (
            object_share(joined.index, row) if shares is None else shares.get(joined.index.names([row])[0], math.nan)
        )
    bands = np.asarray(_bands(share, SIZE_BANDS, lambda v: f"{v:.1%}", "no masks"), dtype=object)
    negative = joined.label == 0
    present = list(dict.fromkeys(bands[~negative]))
    rows = [_row(joined, band, negative | (bands == band), n, seed) for band in present]
    note = "share of the photo that objects cover; each band's positives against all negatives"
    return {"field": "object_size", "note": note, "rows": sorted(rows, key=lambda r: r["value"])}


def _error(joined: Joined, k: int, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    index, row = joined.index, int(joined.rows[k])
    tags = {tag: _word(list(names.get(tag, ())), int(getattr(index, tag)[row])) for tag in TAGS}
    return {
        "id": index.names([row])[0],
        "row": row,
        "label": int(joined.label[k]),
        "probability": float(joined.probability[k]),
        "group": str(joined.group[k]),
        "city": str(index.city[row]),
        **tags,
    }
