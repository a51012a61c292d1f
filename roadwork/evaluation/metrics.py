"""Binary metrics on numpy arrays: confusion, MCC, calibration, and bootstrap intervals over groups.

Conventions, the same everywhere in the project:
- class 1 is roadwork; a probability counts as positive where it is GREATER than the threshold (`np.round` and argmax do
  the same at 0.5);
- the MCC of a table with an empty row or column is 0 (scikit-learn's convention and the service's);
- a ratio without a denominator (precision without a positive answer) is `None`, never NaN;
- frames of one video are not independent, so intervals come from resampling GROUPS, not photos. With fewer than two
  groups there is no interval: (nan, nan).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Metric = str | Callable[[Array, Array], float]

_CHUNK_CELLS = 4_000_000
"""Resampled group counts held at once (32 MB of float64)."""


class Interval(NamedTuple):
    """Two-sided percentile interval; both ends nan where there is none."""

    low: float
    high: float


class Paired(NamedTuple):
    """Difference b - a of a metric, its interval, and the share of resamples in which b is better."""

    difference: float
    low: float
    high: float
    share_better: float

    @property
    def helps(self) -> bool:
        """True where the whole interval lies above 0 (False without an interval)."""
        return self.low > 0.0


def _labels(labels: Any) -> Array:
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(f"labels must be one-dimensional, got shape {array.shape}")
    if array.size and not np.isin(array, (0, 1)).all():
        wrong = array[~np.isin(array, (0, 1))][0]
        raise ValueError(f"labels must be 0 or 1, got {wrong}; leave unlabelled photos out")
    return array.astype(np.int64)


def _probabilities(probabilities: Any, length: int) -> Array:
    array = np.asarray(probabilities, dtype=np.float64)
    if array.shape != (length,):
        raise ValueError(f"expected {length} probabilities, one per label, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {length} probabilities are not finite")
    return array


def _weights(weights: Any, length: int) -> Array:
    if weights is None:
        return np.ones(length)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (length,) or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"weights must be {length} finite numbers that are not negative, got shape {array.shape}")
    return array


def confusion(labels: Any, probabilities: Any, threshold: float = 0.5, weights: Any = None) -> Array:
    """Confusion table [2, 2]: rows are the truth, columns the answer. int64, or float64 where weights are given.

    It keeps its shape when only one class is there, or none.
    """
    truth = _labels(labels)
    answer = (_probabilities(probabilities, len(truth)) > threshold).astype(np.int64)
    table = np.bincount(
        2 * truth + answer, weights=None if weights is None else _weights(weights, len(truth)), minlength=4
    )
    return table.reshape(2, 2).astype(np.int64 if weights is None else np.float64)


def mcc(confusion: Any) -> float:
    """Matthews correlation coefficient of a confusion table [2, 2]; 0 where a row or a column is empty.

    Integer tables are computed in Python's unbounded integers, so no product overflows. ValueError for another shape.
    """
    table = np.asarray(confusion)
    if table.shape != (2, 2):
        raise ValueError(f"mcc takes a confusion table of shape (2, 2), got {table.shape}")
    tn, fp, fn, tp = (cell.item() for cell in table.ravel())
    rows_and_columns = ((tp + fp), (tp + fn), (tn + fp), (tn + fn))
    if any(side <= 0 for side in rows_and_columns):
        return 0.0
    value = (tp * tn - fp * fn) / math.sqrt(math.prod(rows_and_columns))
    return max(-1.0, min(1.0, float(value)))


def _mcc_rows(tables: Array) -> Array:
    tn, fp, fn, tp = tables.T
    sides = np.stack([tp + fp, tp + fn, tn + fp, tn + fn])
    scale = np.sqrt(sides.prod(axis=0))
    filled = (sides > 0).all(axis=0)
    # Rounding of weighted counts may lead a hair beyond 1.
    return np.where(filled, np.clip((tp * tn - fp * fn) / np.where(filled, scale, 1.0), -1.0, 1.0), 0.0)


def _ratio_rows(over: Array, under: Array) -> Array:
    ratio: Array = np.divide(over, under, out=np.full(len(over), np.nan), where=under > 0)
    return ratio


_TABLE_METRICS: dict[str, Callable[[Array], Array]] = {
    "mcc": _mcc_rows,
    "accuracy": lambda t: _ratio_rows(t[:, 0] + t[:, 3], t.sum(axis=1)),
    "precision": lambda t: _ratio_rows(t[:, 3], t[:, 3] + t[:, 1]),
    "recall": lambda t: _ratio_rows(t[:, 3], t[:, 3] + t[:, 2]),
    "tpr": lambda t: _ratio_rows(t[:, 3], t[:, 3] + t[:, 2]),
    "fpr": lambda t: _ratio_rows(t[:, 1], t[:, 1] + t[:, 0]),
    "f1": lambda t: _ratio_rows(2 * t[:, 3], 2 * t[:, 3] + t[:, 1] + t[:, 2]),
}
"""Metrics of flattened tables [N, 4] = (tn, fp, fn, tp) -> [N]."""

TABLE_METRICS = tuple(_TABLE_METRICS)
"""Names that `group_bootstrap` resamples without touching single photos again."""


def table_metrics(confusion: Any) -> dict[str, float | None]:
    """mcc, accuracy, precision, recall, tpr, fpr and f1 of a confusion table [2, 2]; None where undefined."""
    row = np.asarray(confusion, dtype=np.float64).reshape(1, 4)
    values = {name: float(metric(row)[0]) for name, metric in _TABLE_METRICS.items()}
    values["mcc"] = mcc(confusion)
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def group_codes(groups: Any, length: int) -> Array:
    """Integer group of each photo [length]. None, '' and missing names make a group of their own per photo.

    ValueError for another number of names.
    """
    if groups is None:
        return np.arange(length)
    names = np.asarray(groups, dtype=object)
    if names.shape != (length,):
        raise ValueError(f"expected {length} groups, one per label, got shape {names.shape}")
    own = [f"\0{i}" if name is None or name == "" or name != name else str(name) for i, name in enumerate(names)]
    return np.unique(np.asarray(own, dtype=object).astype(str), return_inverse=True)[1] if length else np.arange(0)


def _interval(values: Array, level: float) -> Interval:
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(math.nan, math.nan)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _group_tables(truth: Array, scores: Array, codes: Array, weights: Array, threshold: float) -> Array:
    """Confusion counts of every group, [G, 4] float64."""
    cell = 2 * truth + (scores > threshold)
    size = int(codes.max()) + 1
    return np.bincount(codes * 4 + cell, weights=weights, minlength=4 * size).reshape(size, 4)


def _resampled_tables(tables: Array, n: int, rng: np.random.Generator) -> Array:
    """n sums over as many groups as there are, drawn with replacement: [n, columns]."""
    size = len(tables)
    sums = np.empty((n, tables.shape[1]))
    chunk = max(1, _CHUNK_CELLS // size)
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        draws = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size)
        sums[start : start + rows] = counts @ tables
    return sums


def _resampled_rows(codes: Array, n: int, rng: np.random.Generator) -> list[Array]:
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(int(codes.max()) + 2))
    members = [order[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return [np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))]) for _ in range(n)]


def metric_value(
    labels: Any, scores: Any, metric: Metric = "mcc", weights: Any = None, threshold: float = 0.5
) -> float:
    """One metric (a name of TABLE_METRICS or a function of labels and scores); nan where undefined.

    labels [N] in {0, 1}; scores [N] probabilities; weights [N] for named metrics. ValueError for an unknown name.
    """
    truth = _labels(labels)
    values = _probabilities(scores, len(truth))
    if callable(metric):
        return float(metric(truth, values))
    _check_metric(metric)
    value = table_metrics(confusion(truth, values, threshold, weights))[metric]
    return math.nan if value is None else value


def _check_metric(metric: str) -> None:
    if metric not in _TABLE_METRICS:
        raise ValueError(f"unknown metric {metric!r}; allowed: {', '.join(TABLE_METRICS)}, or a function")


def group_bootstrap(
    labels: Any,
    scores: Any,
    groups: Any,
    metric: Metric = "mcc",
    n: int = 1000,
    seed: int = 0,
    weights: Any = None,
    threshold: float = 0.5,
    level: float = 0.95,
) -> Interval:
    """Percentile interval (low, high) of a metric under resampling of whole groups.

    labels [N] in {0, 1}; scores [N] probabilities; groups [N] names (None: each photo is its own group);
    weights [N] multiply the photos (see `prior_weights`; only for named metrics). Named metrics cost O(n * groups).
    Cameron, Gelbach & Miller 2008 (cluster bootstrap).
    """
    truth = _labels(labels)
    values = _probabilities(scores, len(truth))
    codes = group_codes(groups, len(truth))
    if len(truth) == 0 or codes.max() == 0 or n < 1:
        return Interval(math.nan, math.nan)
    rng = np.random.default_rng(seed)
    if callable(metric):
        results = np.asarray(
            [metric(truth[rows], values[rows]) for rows in _resampled_rows(codes, n, rng)], dtype=np.float64
        )
        return _interval(results, level)
    _check_metric(metric)
    tables = _group_tables(truth, values, codes, _weights(weights, len(truth)), threshold)
    return _interval(_TABLE_METRICS[metric](_resampled_tables(tables, n, rng)), level)


def paired_group_bootstrap(
    labels: Any,
    scores_a: Any,
    scores_b: Any,
    groups: Any,
    metric: Metric = "mcc",
    n: int = 1000,
    seed: int = 0,
    weights: Any = None,
    threshold: float = 0.5,
    level: float = 0.95,
) -> Paired:
    """Difference metric(b) - metric(a) on the same photos, both scored on the SAME resampled groups.

    Arguments as `group_bootstrap`, scores_a and scores_b [N]. Without two groups the interval is nan and `helps` is
    False.
    """
    truth = _labels(labels)
    a, b = (_probabilities(scores, len(truth)) for scores in (scores_a, scores_b))
    codes = group_codes(groups, len(truth))
    difference = math.nan
    if len(truth):
        first, second = (metric_value(truth, scores, metric, weights, threshold) for scores in (a, b))
        difference = second - first
    if len(truth) == 0 or codes.max() == 0 or n < 1:
        return Paired(difference, math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    if callable(metric):
        rows = _resampled_rows(codes, n, rng)
        gains = np.asarray([metric(truth[r], b[r]) - metric(truth[r], a[r]) for r in rows], dtype=np.float64)
    else:
        w = _weights(weights, len(truth))
        tables = np.hstack([_group_tables(truth, scores, codes, w, threshold) for scores in (a, b)])
        sums = _resampled_tables(tables, n, rng)
        gains = _TABLE_METRICS[metric](sums[:, 4:]) - _TABLE_METRICS[metric](sums[:, :4])
    low, high = _interval(gains, level)
    finite = gains[np.isfinite(gains)]
    return Paired(difference, low, high, float((finite > 0).mean()) if len(finite) else math.nan)


def prior_weights(labels: Any, prior: float | None) -> Array:
    """Weights [N] per photo, summing to N, under which the share of positives is `prior`.

    None, or a set with one class only (which no weights can balance), gives ones. ValueError for a prior that is not
    between 0 and 1.
    """
    truth = _labels(labels)
    if prior is None:
        return np.ones(len(truth))
    if not 0.0 < prior < 1.0:
        raise ValueError(f"prior must lie between 0 and 1, got {prior}")
    share = truth.mean() if len(truth) else 0.0
    if share in (0.0, 1.0):
        return np.ones(len(truth))
    return np.where(truth == 1, prior / share, (1 - prior) / (1 - share))


class ReliabilityBins(NamedTuple):
    """Equal-width bins: edges [B + 1]; weight, mean probability and share of positives [B] (nan: empty)."""

    edges: Array
    weight: Array
    confidence: Array
    positives: Array


def reliability_bins(labels: Any, probabilities: Any, bins: int = 15, weights: Any = None) -> ReliabilityBins:
    """Bins of a reliability diagram of P(roadwork): labels, probabilities and weights [N]; ValueError beyond 0 to 1."""
    truth = _labels(labels)
    values = _probabilities(probabilities, len(truth))
    if len(values) and (values.min() < 0 or values.max() > 1):
        raise ValueError(f"probabilities must lie in [0, 1], got {values.min():g} to {values.max():g}")
    w = _weights(weights, len(truth))
    which = np.minimum((values * bins).astype(np.int64), bins - 1)
    mass = np.bincount(which, weights=w, minlength=bins)
    mean = _ratio_rows(np.bincount(which, weights=w * values, minlength=bins), mass)
    share = _ratio_rows(np.bincount(which, weights=w * truth, minlength=bins), mass)
    return ReliabilityBins(np.linspace(0, 1, bins + 1), mass, mean, share)


def expected_calibration_error(labels: Any, probabilities: Any, bins: int = 15, weights: Any = None) -> float:
    """Mean distance between P(roadwork) and the share of roadwork over equal bins, weighted by mass; nan for none.

    Naeini et al. 2015, in the binary form (probability of class 1, not of the winning class).
    """
    table = reliability_bins(labels, probabilities, bins, weights)
    filled = table.weight > 0
    if not filled.any():
        return math.nan
    gap = np.abs(table.confidence[filled] - table.positives[filled])
    return float(np.average(gap, weights=table.weight[filled]))


def log_loss(labels: Any, probabilities: Any, weights: Any = None) -> float:
    """Mean negative log-likelihood, natural logarithm; probabilities are kept 1e-7 away from 0 and 1; nan for none."""
    truth = _labels(labels)
    if not len(truth):
        return math.nan
    values = np.clip(_probabilities(probabilities, len(truth)), 1e-7, 1 - 1e-7)
    return float(np.average(-np.log(np.where(truth == 1, values, 1 - values)), weights=_weights(weights, len(truth))))


def area_under_roc(labels: Any, scores: Any, weights: Any = None) -> float | None:
    """Area under the ROC curve; None where a class is missing."""
    from sklearn.metrics import roc_auc_score

    truth = _labels(labels)
    if len(np.unique(truth)) < 2:
        return None
    return float(roc_auc_score(truth, _probabilities(scores, len(truth)), sample_weight=_weights(weights, len(truth))))


def finite_or_none(value: float) -> float | None:
    """A float for JSON: None in place of nan and infinities."""
    return float(value) if math.isfinite(value) else None


def summary(
    labels: Any, probabilities: Any, groups: Any = None, prior: float | None = None, n: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Everything that a table of results shows for one system, JSON-able.

    The metrics are those of the photos as they are; where `prior` is given, `mcc_at_prior` and `ece_at_prior` are
    reweighted to that share of positives, None where one class is missing. `mcc_interval` is [low, high] over groups, or None.
    """
    truth = _labels(labels)
    values = _probabilities(probabilities, len(truth))
    table = confusion(truth, values)
    low, high = group_bootstrap(truth, values, groups, "mcc", n, seed)
    result: dict[str, Any] = {
        "n": len(truth),
        "positives": int(truth.sum()),
        "groups": len(np.unique(group_codes(groups, len(truth)))),
        **table_metrics(table),
        "mcc_interval": None if math.isnan(low) else [low, high],
        "auc": area_under_roc(truth, values),
        "ece": finite_or_none(expected_calibration_error(truth, values)),
        "log_loss": finite_or_none(log_loss(truth, values)),
        "confusion": table.tolist(),
    }
    if prior is None:
        return result
    result |= {"prior": prior, "mcc_at_prior": None, "mcc_at_prior_interval": None, "ece_at_prior": None}
    if len(np.unique(truth)) == 2:
        weights = prior_weights(truth, prior)
        low, high = group_bootstrap(truth, values, groups, "mcc", n, seed, weights=weights)
        result["mcc_at_prior"] = mcc(confusion(truth, values, weights=weights))
        result["mcc_at_prior_interval"] = None if math.isnan(low) else [low, high]
        result["ece_at_prior"] = finite_or_none(expected_calibration_error(truth, values, weights=weights))
    return result
