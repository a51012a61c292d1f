"""How far features lie from the training features: nearest neighbours at three depths, or one shrunk Gaussian."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, solve_triangular

QUERY_ROWS = 1024
"""Rows per block of the distance matrix: bounds it to QUERY_ROWS x training rows in float64."""


@dataclass(frozen=True)
class Neighbours:
    """Mean Euclidean distance to the k nearest training features, with the training images' own threshold.

    Putzu, Loddo, Di Ruberto, J. Imaging 11(9):295 (2025), doi 10.3390/jimaging11090295.
    """

    features: np.ndarray
    squares: np.ndarray
    k: int
    threshold: float

    @classmethod
    def fit(cls, features: np.ndarray, k: int = 5, percentile: float = 95.0) -> Neighbours:
        """features [N,D]; the threshold is a percentile of the leave-one-out distances of the same N rows.

        ValueError for N < 2.
        """
        rows = np.ascontiguousarray(features, np.float64)
        if len(rows) < 2:
            raise ValueError(f"nearest neighbours need at least 2 training features, got {len(rows)}")
        k = min(k, len(rows) - 1)
        blank = cls(rows, np.einsum("nd,nd->n", rows, rows), k, float("nan"))
        own = blank._nearest(rows, leave_out_self=True)
        return cls(rows, blank.squares, k, float(np.percentile(own, percentile)))

    def distance(self, queries: np.ndarray) -> np.ndarray:
        """queries [M,D] -> float64 [M]."""
        return self._nearest(np.asarray(queries, np.float64), leave_out_self=False)

    def _nearest(self, queries: np.ndarray, leave_out_self: bool) -> np.ndarray:
        result = np.empty(len(queries), np.float64)
        for first in range(0, len(queries), QUERY_ROWS):
            block = queries[first : first + QUERY_ROWS]
            squared = np.einsum("md,md->m", block, block)[:, None] - 2.0 * block @ self.features.T + self.squares
            if leave_out_self:
                squared[np.arange(len(block)), first + np.arange(len(block))] = np.inf
            nearest = np.partition(squared, self.k - 1, axis=1)[:, : self.k]
            result[first : first + len(block)] = np.sqrt(np.maximum(nearest, 0.0)).mean(axis=1)
        return result


@dataclass(frozen=True)
class ShrunkGaussian:
    """Mahalanobis distance under a Ledoit-Wolf covariance, by Cholesky in float64."""

    mean: np.ndarray
    lower: np.ndarray
    shrinkage: float
    threshold: float

    @classmethod
    def fit(cls, features: np.ndarray, percentile: float = 95.0) -> ShrunkGaussian:
        """features [N,D], ValueError for N < 2. The threshold is a percentile of the distances of the same N rows.

        Unlike that of `Neighbours`, it is not left-one-out: every row helped to fit the Gaussian, so that new photos lie
        farther than it says. For N near D it is too tight and the filter drops more than 5 % of photos like these.
        """
        rows = np.asarray(features, np.float64)
        if len(rows) < 2:
            raise ValueError(f"a Gaussian needs at least 2 training features, got {len(rows)}")
        mean = rows.mean(axis=0)
        covariance, shrinkage = ledoit_wolf(rows - mean)
        # Constant features give an exactly singular matrix even when shrunk; the smallest jitter makes it definite.
        # Not smaller than this, so that distances from features that are all alike can still be squared.
        jitter = np.finfo(np.float64).eps * max(float(np.trace(covariance)), 1e-12)
        lower = cholesky(covariance + jitter * np.eye(len(mean)), lower=True)
        blank = cls(mean, lower, shrinkage, float("nan"))
        return cls(mean, lower, shrinkage, float(np.percentile(blank.distance(rows), percentile)))

    def distance(self, queries: np.ndarray) -> np.ndarray:
        """queries [M,D] -> float64 [M]: sqrt((x - mean)' S^-1 (x - mean))."""
        centred = np.asarray(queries, np.float64) - self.mean
        white = solve_triangular(self.lower, centred.T, lower=True)
        distance: np.ndarray = np.sqrt(np.einsum("dm,dm->m", white, white))
        return distance


def ledoit_wolf(centred: np.ndarray) -> tuple[np.ndarray, float]:
    """Shrunk covariance [D,D] and the shrinkage of centred rows [N,D] (Ledoit and Wolf 2004, lemmas 3.2 to 3.5)."""
    number, width = centred.shape
    empirical = centred.T @ centred / number
    scale = float(np.trace(empirical)) / width
    fourth = float(np.sum(np.einsum("nd,nd->n", centred, centred) ** 2)) / number
    squared = float(np.sum(empirical**2))
    spread = (squared - width * scale**2) / width
    noise = min((fourth - squared) / (width * number), spread)
    shrinkage = 0.0 if spread <= 0 or noise <= 0 else noise / spread
    shrunk = (1 - shrinkage) * empirical
    shrunk.flat[:: width + 1] += shrinkage * scale
    return shrunk, shrinkage


def distance_names(depths: int) -> list[str]:
    """Names of the columns of `TrainingDistribution.distances`, from the lowest depth to the highest."""
    return [*(f"knn_depth_{depth}" for depth in range(1, depths + 1)), "mahalanobis"]


@dataclass(frozen=True)
class TrainingDistribution:
    """Both detectors, fitted on the same training features at three depths (low, mid, high)."""

    neighbours: tuple[Neighbours, ...]
    gaussian: ShrunkGaussian
    number: int
    digest: str

    @classmethod
    def fit(cls, depths: tuple[np.ndarray, ...], k: int) -> TrainingDistribution:
        """depths: per depth [N,D]; the Gaussian describes the last one."""
        neighbours = tuple(Neighbours.fit(depth, k) for depth in depths)
        digest = hashlib.blake2b(digest_size=16)
        for one in neighbours:
            # Rounded: another number of processes may change the last bits of a feature.
            digest.update(np.round(_relative(one.features.mean(axis=0), one.threshold), 3).tobytes())
        return cls(neighbours, ShrunkGaussian.fit(depths[-1]), len(depths[0]), digest.hexdigest())

    def thresholds(self) -> dict[str, float]:
        """The distances that count as 1, by name (see `distance_names`)."""
        values = [*(model.threshold for model in self.neighbours), self.gaussian.threshold]
        return dict(zip(distance_names(len(self.neighbours)), values, strict=True))

    def distances(self, depths: tuple[np.ndarray, ...]) -> np.ndarray:
        """Distances over their thresholds, float64 [M, depths + 1]: neighbours per depth, then Mahalanobis.

        1 is the training images' own 95th percentile.
        """
        columns = [
            _relative(model.distance(depth), model.threshold)
            for model, depth in zip(self.neighbours, depths, strict=True)
        ]
        columns.append(_relative(self.gaussian.distance(depths[-1]), self.gaussian.threshold))
        return np.stack(columns, axis=1)


def _relative(distance: np.ndarray, threshold: float) -> np.ndarray:
    return distance / max(threshold, 1e-12)
