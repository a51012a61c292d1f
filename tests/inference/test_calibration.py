"""Temperature and bias: known values come back under prior shift, and degenerate sets end in the analytic shift."""

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from roadwork.evaluation.metrics import prior_weights
from roadwork.inference.calibration import Calibration, analytic_shift, fit_calibration, group_cross_fit


def shifted_sample(n: int, source: float, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels at prior `source`, and log-odds that are right under that prior except for a factor."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < source).astype(int)
    evidence = rng.normal(np.where(labels == 1, 1.0, -1.0), 1.0)  # log-likelihood ratio of these normals is 2x
    return temperature * (2 * evidence + logit(source)), labels


@pytest.mark.parametrize(("source", "prior", "temperature"), [(0.8, 0.5, 2.5), (0.8, 0.5, 0.4), (0.3, 0.8, 1.0)])
def test_known_temperature_and_bias_come_back_under_prior_shift(source, prior, temperature):
    z, labels = shifted_sample(40_000, source, temperature)
    fit = fit_calibration(z, labels, prior=prior, source_prior=source)
    assert fit.fitted
    assert fit.calibration.temperature == pytest.approx(temperature, rel=0.05)
    assert fit.calibration.bias == pytest.approx(logit(prior) - logit(source), abs=0.06)
    assert fit.analytic_bias == pytest.approx(logit(prior) - logit(source), abs=1e-12)


def test_agrees_with_weighted_logistic_regression():
    z, labels = shifted_sample(20_000, 0.8, 1.7, seed=1)
    fit = fit_calibration(z, labels, prior=0.5, source_prior=0.8).calibration
    reference = LogisticRegression(C=1e9).fit(z[:, None], labels, sample_weight=prior_weights(labels, 0.5))
    assert 1 / fit.temperature == pytest.approx(reference.coef_[0, 0], rel=2e-3)
    assert fit.bias == pytest.approx(reference.intercept_[0], abs=5e-3)


def test_a_wrong_prior_of_the_draws_is_only_the_start():
    z, labels = shifted_sample(20_000, 0.8, 1.0, seed=2)
    right = fit_calibration(z, labels, prior=0.5, source_prior=0.8).calibration
    wrong = fit_calibration(z, labels, prior=0.5, source_prior=0.3).calibration
    assert wrong.bias == pytest.approx(right.bias, abs=0.02)


def test_few_separable_photos_do_not_end_in_certainty():
    z = np.array([-2.0, -1.5, 1.0, 2.0, 2.5])
    fit = fit_calibration(z, np.array([0, 0, 1, 1, 1]), prior=0.5, source_prior=0.6)
    assert fit.calibration.temperature > 0.1
    assert fit.calibration.probability(np.array([1.0]))[0] < 0.999


@pytest.mark.parametrize("labels", [np.zeros(0, int), np.ones(9, int)])
def test_one_class_or_none_gives_the_analytic_shift(labels):
    fit = fit_calibration(np.linspace(-1, 1, len(labels)), labels, prior=0.5, source_prior=0.8)
    assert not fit.fitted
    assert fit.calibration == Calibration(1.0, analytic_shift(0.8, 0.5))
    assert analytic_shift(0.8, 0.5) == pytest.approx(-np.log(4))


def test_only_the_prior_that_was_measured_is_kept_off_the_ends():
    for prior in (1e-5, 1 - 1e-5):
        assert analytic_shift(0.5, prior) == pytest.approx(logit(prior), rel=1e-6), "the user's is taken at its word"
    assert [analytic_shift(prior, 0.5) for prior in (0.0, 1.0)] == pytest.approx([-logit(1e-3), logit(1e-3)])


def test_probability_is_what_the_service_computes():
    z = np.array([-3.0, 0.0, 4.0])
    assert np.array_equal(Calibration(2.0, 0.5).probability(z), expit(z / 2.0 + 0.5))


def test_cross_fitting_never_sees_the_own_group():
    groups = np.array(["a", "a", "b", "", "", "c"])
    seen: dict[int, set[int]] = {}

    def fit(rows):
        def score(outside):
            for row in outside:
                seen[int(row)] = set(rows.tolist())
            return np.zeros(len(outside))

        return score

    group_cross_fit(fit, groups)
    assert set(seen) == set(range(6))
    assert all(row not in inside for row, inside in seen.items())
    assert not seen[0] & {0, 1}
    assert any(4 in inside for row, inside in seen.items() if row == 3), "photos without a group are not one group"
