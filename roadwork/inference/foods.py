"""FOODS test-time augmentation: which augmented answers to believe, and how much.

Filtering of out-of-distribution augmentations and self-ensembling by distance, after Putzu, Loddo, Di Ruberto,
"Test-Time Augmentation for Cross-Domain Leukocyte Classification via OOD Filtering and Self-Ensembling",
J. Imaging 11(9):295 (2025), doi 10.3390/jimaging11090295. The original photo is always kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit, logit

TEMPERATURES: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, float("inf"))
"""Candidates for the temperature of the weights; distances are in units of the training features' own threshold.
Infinity weighs everything kept alike."""


@dataclass(frozen=True)
class Selection:
    """What is kept of N photos' A augmentations: kept bool [N,A] (column 0, the original, always), distance [N,A]."""

    kept: np.ndarray
    distance: np.ndarray

    def rows(self, keep: np.ndarray) -> Selection:
        """Some of the photos (bool or integer index)."""
        return Selection(self.kept[keep], self.distance[keep])


def select(
    distances: np.ndarray,
    filter: Literal["knn", "mahalanobis"],
    keep: Literal["threshold", "ratio"],
    keep_ratio: float,
) -> Selection:
    """Filter augmentations by their distance to the training features.

    distances [N,A,depths + 1] in units of the threshold: neighbours per depth, then Mahalanobis (see
    `TrainingDistribution.distances`). With `threshold` an augmentation stays where it lies within the threshold at
    EVERY depth; with `ratio` the nearest ceil(keep_ratio * A) stay, ties to the earlier one. The original always
    stays, within the number too. The distance is the mean over depths. ValueError for another shape.
    """
    if distances.ndim != 3 or distances.shape[-1] < 2:
        raise ValueError(f"distances must have shape [photos, augmentations, depths + 1], got {distances.shape}")
    chosen = distances[..., :-1] if filter == "knn" else distances[..., -1:]
    mean = chosen.mean(axis=-1)
    if keep == "threshold":
        kept = np.asarray((chosen <= 1.0).all(axis=-1))
    else:
        number = max(1, int(np.ceil(keep_ratio * mean.shape[1])))
        ranked = mean.copy()
        ranked[:, 0] = -np.inf
        order = np.argsort(ranked, axis=1, kind="stable")[:, :number]
        kept = np.zeros(mean.shape, bool)
        np.put_along_axis(kept, order, True, axis=1)
    kept[:, 0] = True
    return Selection(kept, mean)


def weights(selection: Selection, temperature: float) -> np.ndarray:
    """softmax(-(d - d_min) / T) over what is kept, float64 [N,A], rows sum to 1; T = inf weighs all kept alike."""
    distance = np.where(selection.kept, selection.distance, np.inf)
    nearest = distance.min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        scaled = np.where(selection.kept, (distance - nearest) / temperature, np.inf)
    raw = np.exp(-scaled)
    share: np.ndarray = raw / raw.sum(axis=1, keepdims=True)
    return share


def combine(log_odds: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Weighted soft vote, as log-odds.

    log_odds [N,A] or [N,A,M] (members), share [N,A] -> [N] or [N,M]. Where one augmentation carries all the weight its
    log-odds are returned as they are: nothing is rounded through a probability.
    """
    values = np.asarray(log_odds, np.float64)
    flat = values if values.ndim == 3 else values[..., None]
    voted = np.einsum("na,nam->nm", share, expit(flat))
    tiny = np.finfo(np.float64).tiny
    mixed = logit(np.clip(voted, tiny, 1 - np.finfo(np.float64).epsneg))
    alone = np.count_nonzero(share, axis=1) == 1
    single = flat[np.arange(len(flat)), share.argmax(axis=1)]
    result: np.ndarray = np.where(alone[:, None], single, mixed)
    return result if values.ndim == 3 else result[:, 0]


def fit_temperature(
    selection: Selection,
    log_odds: np.ndarray,
    score: Callable[[np.ndarray], float],
    candidates: Sequence[float] = TEMPERATURES,
) -> tuple[float, list[tuple[float, float]]]:
    """The temperature with the smallest `score` (a held-out loss of combined log-odds [N]); ties to the largest.

    Returns it with every candidate's score.
    """
    table = [(float(t), float(score(combine(log_odds, weights(selection, t))))) for t in candidates]
    best = min(table, key=lambda row: (row[1], -row[0]))
    return best[0], table
