"""What a classifier knows that never sees a pixel: GPS, weather, day time and scene alone."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from roadwork.evaluation import metrics

Array = npt.NDArray[Any]


class Columns(Protocol):
    """The columns of a shard index, all of length n; -1 and nan mean unknown."""

    label: Any
    group: Any
    latitude: Any
    longitude: Any
    weather: Any
    daytime: Any
    scene: Any


def metadata_features(index: Columns) -> Array:
    """[N, F] float64: place on the unit sphere (0 where unknown), known or not, and one-hot weather, day time,
    scene.
    """
    latitude, longitude = (np.radians(np.asarray(v, dtype=np.float64)) for v in (index.latitude, index.longitude))
    known = np.isfinite(latitude) & np.isfinite(longitude)
    a, o = np.where(known, latitude, 0.0), np.where(known, longitude, 0.0)
    sphere = np.stack([np.cos(a) * np.cos(o), np.cos(a) * np.sin(o), np.sin(a)], axis=1) * known[:, None]
    tags = [
        np.eye(17)[np.clip(np.asarray(v, dtype=np.int64), -1, 15)] for v in (index.weather, index.daytime, index.scene)
    ]
    return np.concatenate([sphere, known[:, None], *tags], axis=1)


def _candidates(seed: int) -> dict[str, Any]:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        "random forest": RandomForestClassifier(100, min_samples_leaf=5, random_state=seed, n_jobs=1),
    }


def metadata_classifier(
    train: Columns, held_out: Columns, prior: float = 0.5, seed: int = 0, most: int = 50_000
) -> tuple[Array, str] | None:
    """P(roadwork) [n] of the held-out photos under `prior`, and which model; None where train has one class or no
    label.

    The stronger of a logistic regression and a random forest by MCC in cross-validation over the TRAINING groups. Both
    learn with photos reweighted to `prior`, as the detector's answers are moved to it. `most`: training photos used.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    rows = np.flatnonzero(np.isin(np.asarray(train.label), (0, 1)))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    labels = np.asarray(train.label)[rows].astype(np.int64)
    if len(rows) == 0 or len(np.unique(labels)) < 2:
        return None
    features = metadata_features(train)[rows]
    weights = metrics.prior_weights(labels, prior)
    groups = metrics.group_codes(np.asarray(train.group)[rows], len(rows))
    folds = min(3, len(np.unique(groups)), int(np.bincount(labels).min()))
    candidates = _candidates(seed)
    best = "logistic regression"
    if folds >= 2:
        splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(features, labels, groups))
        scores = {
            name: _cross_validated(model, features, labels, weights, splits) for name, model in candidates.items()
        }
        best = max(scores, key=lambda name: scores[name])
    model = _fitted(candidates[best], features, labels, weights)
    return model.predict_proba(metadata_features(held_out))[:, 1], best


def _fitted(model: Any, features: Array, labels: Array, weights: Array) -> Any:
    last = model.steps[-1][0] + "__" if hasattr(model, "steps") else ""
    return model.fit(features, labels, **{f"{last}sample_weight": weights})


def _cross_validated(model: Any, features: Array, labels: Array, weights: Array, splits: Any) -> float:
    values = np.full(len(labels), 0.5)
    for fit, held in splits:
        if len(np.unique(labels[fit])) == 2:
            values[held] = _fitted(model, features[fit], labels[fit], weights[fit]).predict_proba(features[held])[:, 1]
    return metrics.metric_value(labels, values, "mcc", weights)
