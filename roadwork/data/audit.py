"""What the data give away: how well each metadata field, and its absence, tells the label; copies across splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from roadwork.data.duplicates import MAX_BITS, near_pairs
from roadwork.data.geo import nearest_km
from roadwork.data.plan import Entry
from roadwork.data.record import PROVENANCE

LEAK_AUC = 0.90
"""A field whose value or absence reaches this area under the ROC curve is called a leak."""
_MOST_ROWS, _FOLDS = 20_000, 5
FIELDS = (
    "gps",
    "weather",
    "daytime",
    "scene",
    "city",
    "description",
    "travel_alteration",
    "photo_size",
    "file_format",
    *PROVENANCE,
)
VISIBLE = ("gps", "weather", "daytime", "scene")
"""Fields that the model may see by default."""


def leak_audit(entries: Sequence[Entry], photos: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Cross-validated by group on the labelled training photos: balanced accuracy and AUC of each field alone.

    `value` is a logistic regression on the one-hot field (words for text, a shallow tree for coordinates and numbers),
    `missing` one on whether it is there at all. 0.5 is chance, also where a field is the same everywhere; None where
    there are too few photos or one class only.
    """
    chosen = [i for i, entry in enumerate(entries) if entry.split == "train" and entry.record.label is not None]
    if len(chosen) > _MOST_ROWS:
        chosen = sorted(np.random.default_rng(seed).choice(chosen, _MOST_ROWS, replace=False).tolist())
    labels = np.array([entries[i].record.label for i in chosen])
    groups = np.unique([entries[i].group for i in chosen], return_inverse=True)[1] if chosen else np.zeros(0)
    columns = {name: [_value(name, entries[i], photos[i]) for i in chosen] for name in FIELDS}
    report: dict[str, Any] = {"rows": len(chosen), "threshold_auc": LEAK_AUC, "fields": {}, "leaks": []}
    for name, values in columns.items():
        absent = np.array([value is None for value in values])
        found = {
            "missing_share": float(absent.mean()) if len(absent) else None,
            "value": _score(_features(name, values), labels, groups, tree=name == "gps" or _numbers(name, values)),
            "missing": _score(absent[:, None].astype(float), labels, groups),
        }
        report["fields"][name] = found
        scores = {"value": found["value"], "missing": found["missing"]}
        report["leaks"] += [
            f"{name} ({kind})" for kind, s in scores.items() if isinstance(s, dict) and s["auc"] >= LEAK_AUC
        ]
    together = [_features(name, columns[name]) for name in VISIBLE]
    joined = (
        np.concatenate([f for f in together if f is not None], axis=1) if any(f is not None for f in together) else None
    )
    report["visible_together"] = _score(joined, labels, groups, tree=True)
    return report


def _value(name: str, entry: Entry, photo: dict[str, Any]) -> Any:
    record = entry.record
    if name == "gps":
        return None if record.latitude is None else entry.latlon()
    if name == "photo_size":
        return photo["size"]
    if name == "file_format":
        return photo["format"]
    if name in PROVENANCE:
        return record.provenance[list(PROVENANCE).index(name)] if record.provenance else None
    value = getattr(record, name)
    return None if value in ("", None) else value


def _numbers(name: str, values: Sequence[Any]) -> bool:
    """Whether a field's values are quantities."""
    return name in PROVENANCE and all(isinstance(value, (int, float)) for value in values if value is not None)


def _features(name: str, values: Sequence[Any]) -> np.ndarray | None:
    """Dense features [N, F] of one field; absence is a value of its own."""
    if not len(values) or all(value is None for value in values):
        return None
    if name == "gps":
        return np.array([(value if value is not None else (-999.0, -999.0)) for value in values], dtype=np.float64)
    if _numbers(name, values):
        known = sorted({value for value in values if value is not None})
        ranks = {value: float(rank) for rank, value in enumerate(known)}  # a tree asks for no more, at any magnitude
        return np.array([[-1.0 if value is None else ranks[value]] for value in values])
    if name == "description" or name in PROVENANCE:
        from sklearn.feature_extraction.text import HashingVectorizer

        texts = ["" if value is None else str(value) for value in values]
        hashing = HashingVectorizer(n_features=128, norm=None, token_pattern=r"\w+")
        counts: np.ndarray = hashing.transform(texts).toarray()
        return counts
    words = ["" if value is None else str(value) for value in values]
    common = [word for word, _ in Counter(words).most_common(64)]
    return np.array([[float(word == other) for other in common] for word in words])


def _score(
    features: np.ndarray | None, labels: np.ndarray, groups: np.ndarray, tree: bool = False
) -> dict[str, float] | None:
    """AUC and balanced accuracy of out-of-fold predictions, folds by group."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.tree import DecisionTreeClassifier

    if features is None or len(labels) < 10 or len(np.unique(labels)) < 2:
        return None
    if (features == features[0]).all():
        return {"auc": 0.5, "balanced_accuracy": 0.5}
    folds = min(_FOLDS, len(np.unique(groups)), int(np.bincount(labels).min()))
    if folds < 2:
        return None
    scores = np.full(len(labels), np.nan)
    for train, held in StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(features, labels, groups):
        if len(np.unique(labels[train])) < 2:
            continue
        model = (
            DecisionTreeClassifier(max_depth=6, min_samples_leaf=5, class_weight="balanced", random_state=0)
            if tree
            else LogisticRegression(class_weight="balanced", max_iter=500)
        )
        scores[held] = model.fit(features[train], labels[train]).predict_proba(features[held])[:, 1]
    done = ~np.isnan(scores)
    if len(np.unique(labels[done])) < 2:
        return None
    return {
        "auc": round(float(roc_auc_score(labels[done], scores[done])), 4),
        "balanced_accuracy": round(float(balanced_accuracy_score(labels[done], scores[done] >= 0.5)), 4),
    }


def duplicate_audit(photos: Sequence[dict[str, Any]], max_bits: int = MAX_BITS) -> dict[str, Any]:
    """Near-duplicates across splits by perceptual hash: counts per pair of splits, and the first twenty by id."""
    between: Counter[str] = Counter()
    examples: list[list[str]] = []
    within = other_label = 0
    for i, j in near_pairs([photo["hash"] for photo in photos], max_bits):
        a, b = photos[i], photos[j]
        if a["group"] != b["group"] and a["label"] != b["label"] and None not in (a["label"], b["label"]):
            other_label += 1
        if a["split"] == b["split"]:
            within += a["group"] != b["group"]
            continue
        between["-".join(sorted((a["split"], b["split"])))] += 1
        if len(examples) < 20:
            examples.append([f"{a['split']}:{a['id']}", f"{b['split']}:{b['id']}"])
    return {
        "method": f"imagehash.phash, 64 bits, at most {max_bits} differ",
        "across_splits": dict(sorted(between.items())),
        "examples": sorted(examples),
        "within_a_split_across_groups": int(within),
        "across_groups_with_other_label": other_label,
    }


def neighbour_audit(entries: Sequence[Entry], metres: float = 100.0) -> dict[str, Any]:
    """Training and validation photos that stand within 100 m of a test photo (of another group)."""
    places = {
        split: np.array([entry.latlon() for entry in entries if entry.split == split]).reshape(-1, 2)
        for split in ("train", "val", "test")
    }
    test = places["test"][~np.isnan(places["test"]).any(axis=1)]
    near = {}
    for split in ("train", "val"):
        distance = nearest_km(places[split], test) * 1000.0
        near[split] = int((distance <= metres).sum())
    return {"metres": metres, "near_a_test_photo": near}
