"""Filter, weights and vote on cases computed by hand."""

import numpy as np
import pytest
from scipy.special import expit, logit

from roadwork.inference.foods import Selection, combine, fit_temperature, select, weights

DISTANCES = np.array(
    [
        # neighbours at three depths, Mahalanobis; in units of the threshold
        [[2.0, 2.0, 2.0, 3.0], [0.5, 0.6, 0.7, 2.0], [0.5, 0.6, 1.2, 0.5], [0.9, 0.9, 0.9, 0.9]],
        [[0.1, 0.1, 0.1, 0.1], [3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]],
    ]
)


def test_threshold_keeps_what_is_near_at_every_depth_and_always_the_original():
    knn = select(DISTANCES, "knn", "threshold", 0.8)
    assert knn.kept.tolist() == [[True, True, False, True], [True, False, False, True]]
    mahalanobis = select(DISTANCES, "mahalanobis", "threshold", 0.8)
    assert mahalanobis.kept.tolist() == [[True, False, True, True], [True, False, False, True]]
    assert knn.distance[0, 1] == pytest.approx(0.6)


@pytest.mark.parametrize(("ratio", "number"), [(1.0, 4), (0.8, 4), (0.75, 3), (0.5, 2), (0.01, 1)])
def test_ratio_keeps_that_many_the_original_among_them(ratio, number):
    kept = select(DISTANCES, "knn", "ratio", ratio).kept
    assert kept.sum(1).tolist() == [number, number]
    assert kept[:, 0].all()
    if number == 2:
        assert kept[0].tolist() == [True, True, False, False]


def test_weights_fall_with_distance_and_leave_out_what_was_dropped():
    selection = Selection(np.array([[True, True, False]]), np.array([[1.0, 2.0, 0.5]]))
    share = weights(selection, 0.5)
    assert share[0] == pytest.approx(np.array([1, np.exp(-2), 0]) / (1 + np.exp(-2)))
    assert weights(selection, float("inf"))[0].tolist() == [0.5, 0.5, 0.0]
    assert weights(selection, 1e-9)[0].tolist() == [1.0, 0.0, 0.0]


def test_vote_is_the_weighted_mean_of_probabilities():
    z = np.array([[[0.3, -1.0], [2.0, 0.5]]])
    share = np.array([[0.25, 0.75]])
    assert combine(z, share)[0] == pytest.approx(logit(0.25 * expit(z[0, 0]) + 0.75 * expit(z[0, 1])))
    assert combine(z[..., 0], share).shape == (1,)


def test_alone_the_original_answers_bit_for_bit():
    z = np.random.default_rng(0).normal(size=(500, 3, 2)) * 20
    kept = np.zeros((500, 3), bool)
    kept[:, 0] = True
    share = weights(Selection(kept, np.abs(z[..., 0])), 0.3)
    assert np.array_equal(combine(z, share), z[:, 0])
    assert np.array_equal(combine(z[:, :1], np.ones((500, 1))), z[:, 0])


def test_certain_answers_stay_finite():
    z = np.full((1, 2), 900.0)
    assert np.isfinite(combine(z, np.array([[0.5, 0.5]]))).all()
    assert np.isfinite(combine(-z, np.array([[0.5, 0.5]]))).all()


def test_temperature_follows_whether_near_augmentations_are_right():
    rng = np.random.default_rng(1)
    truth = np.where(rng.random(400) < 0.5, 2.0, -2.0)
    z = np.stack([truth, -truth], axis=1)  # the far one is wrong
    selection = Selection(np.ones_like(z, bool), np.tile([0.1, 1.0], (400, 1)))
    score = lambda odds: float(np.mean(np.logaddexp(0, -np.sign(truth) * odds)))  # noqa: E731
    best, table = fit_temperature(selection, z, score)
    assert best == min(t for t, _ in table)
    constant, _ = fit_temperature(selection, z, lambda odds: 1.0)
    assert constant == float("inf"), "nothing to choose between: everything kept counts alike"


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="photos, augmentations"):
        select(DISTANCES[0], "knn", "threshold", 0.8)
