"""Paired differences of MCC and AUC over several seeds, with intervals over seeds and groups of photos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from roadwork.evaluation.metrics import group_codes, mcc

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trial:
    """One seed: the same photos answered with a component and without it.

    label int64 [N] in {0, 1}; group [N]; with_it and without: probabilities [K, N] of K networks each, whose metrics are
    averaged.
    """

    label: Ints
    group: npt.NDArray[np.str_]
    with_it: Floats
    without: Floats


class Difference(NamedTuple):
    """with - without, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What may be said of it."""
        return "helps" if self.low > 0 else "harms" if self.high < 0 else "not shown"


def weighted_mcc(label: Ints, probability: Floats, weights: Floats) -> Floats:
    """MCC at threshold 0.5 under each row of photo weights [R, N]: float64 [R]."""
    cell = np.eye(4)[2 * label + (probability > 0.5)]
    return np.array([mcc(table.reshape(2, 2)) for table in weights @ cell])


def weighted_auc(label: Ints, probability: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve under each row of photo weights [R, N]: float64 [R]; nan where a class has no weight.

    The share of (positive, negative) pairs in the right order, ties counted half (Mann and Whitney 1947).
    """
    _, place = np.unique(probability, return_inverse=True)
    levels = np.eye(place.max() + 1)[place]
    positive, negative = (weights * (label == 1)) @ levels, (weights * (label == 0)) @ levels
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    ordered = (positive * below).sum(axis=1)
    area: Floats = np.divide(ordered, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return area


Metric = Callable[[Ints, Floats, Floats], Floats]
METRICS: dict[str, Metric] = {"mcc": weighted_mcc, "auc": weighted_auc}


def paired_difference(trials: Sequence[Trial], metric: str = "mcc", resamples: int = 1000, seed: int = 0) -> Difference:
    """Mean difference over the trials, its interval by a two-level bootstrap.

    Seeds are drawn with replacement, and in each seed whole groups of photos are, the same ones for both sides
    (Davison and Hinkley 1997, section 3.8). So the interval knows of the luck of initial weights and of the luck of
    places. One seed fewer is drawn than there are: as many would understate the variance between n seeds by (n-1)/n
    (Rao and Wu 1988), much for the few that an ablation has. With fewer than two groups in a trial there is no
    interval: nan.
    """
    measure, rng = METRICS[metric], np.random.default_rng(seed)
    values, spread = [], []
    for trial in trials:
        codes = group_codes(trial.group, len(trial.label))
        size = int(codes.max()) + 1
        draws = rng.multinomial(size, np.full(size, 1 / size), size=resamples) if size > 1 else np.full((1, 1), np.nan)
        weights = np.vstack([np.ones(len(codes)), draws[:, codes]])
        gain = _mean(measure, trial.label, trial.with_it, weights) - _mean(measure, trial.label, trial.without, weights)
        values.append(float(gain[0]))
        spread.append(gain[1:] if size > 1 else np.full(resamples, np.nan))
    chosen = rng.integers(len(trials), size=(resamples, max(1, len(trials) - 1)))
    means = np.stack(spread)[chosen, np.arange(resamples)[:, None]].mean(axis=1)
    low, high = (
        (float(edge) for edge in np.nanquantile(means, (0.025, 0.975)))
        if np.isfinite(means).any()
        else (
            float("nan"),
            float("nan"),
        )
    )
    return Difference(float(np.mean(values)), low, high)


def _mean(measure: Metric, label: Ints, several: Floats, weights: Floats) -> Floats:
    mean: Floats = np.mean([measure(label, one, weights) for one in several], axis=0)
    return mean
