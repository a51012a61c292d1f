"""Temperature and bias under the class prior of the place where the answers are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.model_selection import GroupKFold

from roadwork.evaluation.metrics import group_codes, prior_weights

SPREAD_LOG_TEMPERATURE = 1.0
"""Standard deviation of the Gaussian prior on log T: a few dozen separable photos must not push T to 0."""
SPREAD_BIAS = 2.0
"""Standard deviation of the Gaussian prior on the bias, around the analytic shift."""


@dataclass(frozen=True)
class Calibration:
    """p = sigmoid(log_odds / temperature + bias), log_odds = logit of the positive class minus that of the negative."""

    temperature: float = 1.0
    bias: float = 0.0

    def log_odds(self, log_odds: np.ndarray) -> np.ndarray:
        """Calibrated log-odds, same shape, float64."""
        return np.asarray(log_odds, np.float64) / self.temperature + self.bias

    def probability(self, log_odds: np.ndarray) -> np.ndarray:
        """Probability of roadwork, same shape, float64."""
        probability: np.ndarray = expit(self.log_odds(log_odds))
        return probability


@dataclass(frozen=True)
class Fit:
    """A fitted calibration and how it came about."""

    calibration: Calibration
    analytic_bias: float
    fitted: bool
    reason: str


def log_odds_of(prior: float) -> float:
    """log(p / (1 - p)) of a class prior in (0, 1)."""
    return float(np.log(prior) - np.log1p(-prior))


def analytic_shift(from_prior: float, to_prior: float) -> float:
    """Bias that moves a model trained under one class prior to another (Saerens et al. 2002, eq. 4, in log-odds).

    from_prior was measured and is kept off 0 and 1: a class that was never seen says nothing exact. to_prior, in (0, 1),
    is what the user knows.
    """
    return log_odds_of(to_prior) - log_odds_of(min(max(float(from_prior), 1e-3), 1 - 1e-3))


def shift_to_prior(made_for: float | None, prior: float, whose: str, notes: list[str]) -> float:
    """What is added to log-odds that were made for one class prior, so that they answer for another; both in (0, 1).

    made_for: None where nobody knows it: then the shift is 0. whose: answers, in words, for the note that says so.
    """
    if made_for is None:
        notes.append(f"nothing says which prior {whose} was made for: its answers are taken as they are")
        return 0.0
    shift = log_odds_of(prior) - log_odds_of(made_for)
    if shift:
        notes.append(f"{whose} was made for prior {made_for:g}: its answers are shifted by {shift:+.3f} to {prior:g}")
    return shift


def fit_calibration(log_odds: np.ndarray, labels: np.ndarray, *, prior: float, source_prior: float) -> Fit:
    """Temperature and bias by maximum a posteriori on held-out samples reweighted to `prior`.

    log_odds [N], labels {0,1} [N]. `source_prior` is the positives' share of the training DRAWS; the shift from it
    to `prior` is the start value and the centre of the bias' prior (weak: SPREAD_*), so that it also is the answer
    where the held-out samples hold one class or none.
    """
    shift = analytic_shift(source_prior, prior)
    labels = np.asarray(labels)
    z = np.asarray(log_odds, np.float64)
    if len(labels) == 0 or len(np.unique(labels)) < 2:
        return Fit(Calibration(1.0, shift), shift, False, "the held-out samples hold fewer than two classes")
    weights = prior_weights(labels, prior)
    sign = np.where(labels == 1, 1.0, -1.0)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_slope, bias = parameters
        slope = np.exp(log_slope)
        margin = sign * (slope * z + bias)
        outer = -weights * sign * expit(-margin)
        value = np.sum(weights * np.logaddexp(0.0, -margin))
        value += 0.5 * (log_slope / SPREAD_LOG_TEMPERATURE) ** 2 + 0.5 * ((bias - shift) / SPREAD_BIAS) ** 2
        gradient = np.array([np.sum(outer * z) * slope, np.sum(outer)])
        gradient += np.array([log_slope / SPREAD_LOG_TEMPERATURE**2, (bias - shift) / SPREAD_BIAS**2])
        return float(value), gradient

    start = np.array([0.0, shift])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(-5.0, 5.0), (-20.0, 20.0)])
    best = Calibration(float(np.exp(-found.x[0])), float(found.x[1]))
    return Fit(best, shift, True, "fitted on held-out groups")


def group_cross_fit(
    fit: Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]], groups: np.ndarray, folds: int = 5
) -> np.ndarray:
    """Scores of every sample from parameters that were fitted without its group, float64 [N].

    `fit(rows)` returns a function from rows to scores. With fewer than two groups the fit is on all rows: there is
    nothing to hold out, and the caller says so.
    """
    rows = np.arange(len(groups))
    codes = group_codes(groups, len(groups))
    number = min(folds, len(np.unique(codes)))
    if number < 2:
        return np.asarray(fit(rows)(rows), np.float64)
    scores = np.empty(len(groups), np.float64)
    for inside, outside in GroupKFold(number).split(rows, groups=codes):
        scores[outside] = fit(inside)(outside)
    return scores
