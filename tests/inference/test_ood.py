"""Distances to the training features against scikit-learn."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from roadwork.inference import ood
from roadwork.inference.ood import Neighbours, ShrunkGaussian, TrainingDistribution


def features(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 90)])
def test_mahalanobis_is_scikit_learns(n, d):
    train, queries = features(n, d), features(25, d, seed=1)
    reference = LedoitWolf().fit(train)
    mine = ShrunkGaussian.fit(train)
    assert mine.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-10)
    assert np.allclose(mine.distance(queries) ** 2, reference.mahalanobis(queries), rtol=1e-8)
    assert mine.threshold == pytest.approx(np.percentile(np.sqrt(reference.mahalanobis(train)), 95))


def test_constant_features_do_not_break_the_cholesky():
    train = np.ones((10, 4))
    assert np.isfinite(ShrunkGaussian.fit(train).distance(train)).all()


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_scikit_learns_and_leave_themselves_out(k, monkeypatch):
    monkeypatch.setattr(ood, "QUERY_ROWS", 64)  # several blocks
    train, queries = features(200, 30), features(70, 30, seed=1)
    mine = Neighbours.fit(train, k)
    reference = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train)
    assert np.allclose(mine.distance(queries), reference.kneighbors(queries)[0].mean(1), rtol=1e-9)
    own = reference.kneighbors()[0].mean(1)  # without arguments: each row without itself
    assert mine.threshold == pytest.approx(np.percentile(own, 95))


def test_fewer_features_than_neighbours():
    assert np.isfinite(Neighbours.fit(features(3, 4), 5).distance(features(2, 4))).all()
    with pytest.raises(ValueError, match="at least 2"):
        Neighbours.fit(features(1, 4))


def test_distances_are_in_units_of_each_threshold():
    low, high = features(100, 5), features(100, 8, seed=2)
    both = TrainingDistribution.fit((low, high), 5)
    table = both.distances((low[:3], high[:3]))
    assert table.shape == (3, 3)
    assert np.allclose(table[:, 0] * both.neighbours[0].threshold, both.neighbours[0].distance(low[:3]))
    assert np.allclose(table[:, 2] * both.gaussian.threshold, both.gaussian.distance(high[:3]))
