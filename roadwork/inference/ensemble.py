"""One log-odds from many members (pre-trained model and folds), and the choice among systems on held-out groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, softmax

from roadwork.evaluation.metrics import (
    Paired,
    expected_calibration_error,
    finite_or_none,
    group_bootstrap,
    log_loss,
    metric_value,
    paired_group_bootstrap,
    prior_weights,
)
from roadwork.inference.calibration import Calibration, Fit, fit_calibration, group_cross_fit

Refit = Callable[[np.ndarray], np.ndarray]
"""Rows (integers) -> log-odds [N] of ALL photos under whatever those rows alone choose."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out photos that every choice is made on, and the priors between which answers are moved."""

    labels: np.ndarray
    groups: np.ndarray
    prior: float
    source_prior: float
    resamples: int
    seed: int

    @property
    def weights(self) -> np.ndarray:
        """float64 [N]: the photos reweighted to `prior`."""
        return prior_weights(self.labels, self.prior)

    def fit(self, log_odds: np.ndarray, rows: np.ndarray | None = None) -> Fit:
        """Calibration from the log-odds [N] of all photos, or some rows of them (integer index [n])."""
        use = np.arange(len(self.labels)) if rows is None else rows
        return fit_calibration(log_odds[use], self.labels[use], prior=self.prior, source_prior=self.source_prior)

    def part(self, rows: np.ndarray) -> HeldOut:
        """Some of the photos (integer index [n])."""
        return replace(self, labels=self.labels[rows], groups=self.groups[rows])

    def cross_fitted(
        self, log_odds: np.ndarray, refit: Refit | None = None, applied: np.ndarray | None = None
    ) -> np.ndarray:
        """Probability of every photo under a calibration fitted without its group, [N].

        `refit`: where something else of the log-odds was chosen on held-out photos; it is then chosen without the
        group too, and takes the place of `log_odds`. `applied`: log-odds [N] that the calibration answers, where they
        are others than those it is fitted on.
        """

        def fit(rows: np.ndarray) -> Any:
            odds = log_odds if refit is None else refit(rows)
            calibration = self.fit(odds, rows).calibration
            return lambda outside: calibration.probability((odds if applied is None else applied)[outside])

        return group_cross_fit(fit, self.groups)

    def loss(self, log_odds: np.ndarray) -> float:
        """Negative log-likelihood, in nats, of log-odds [N] under `prior` after cross-fitted calibration."""
        return log_loss(self.labels, self.cross_fitted(log_odds), self.weights)


@dataclass(frozen=True)
class System:
    """A way to answer: the calibration that is deployed, fitted on all held-out photos, and its held-out scores.

    probability [N]: cross-fitted; decisions and the figures `after` are made on it.
    """

    name: str
    calibration: Calibration
    probability: np.ndarray
    figures: dict[str, Any]


def assess(name: str, log_odds: np.ndarray, held_out: HeldOut, refit: Refit | None = None) -> System:
    """Fit the calibration of a system's log-odds [N] and score it: before, with the analytic shift alone, and after
    (cross-fitted).

    With `refit` all that was chosen on held-out photos, not the calibration alone, is cross-fitted in `after`.
    """
    fit = held_out.fit(log_odds)
    after = held_out.cross_fitted(log_odds, refit)
    stages = {
        "before": Calibration().probability(log_odds),
        "analytic": Calibration(1.0, fit.analytic_bias).probability(log_odds),
        "after": after,
    }
    figures = {
        "temperature": fit.calibration.temperature,
        "bias": fit.calibration.bias,
        "analytic_bias": fit.analytic_bias,
        "fitted": fit.fitted,
        "reason": fit.reason,
        **{stage: scores(probability, held_out) for stage, probability in stages.items()},
    }
    return System(name, fit.calibration, after, figures)


def scores(probability: np.ndarray, held_out: HeldOut) -> dict[str, Any]:
    """MCC with its interval over groups, ECE and log-loss of probabilities [N]; None where there is no such figure."""
    weights = held_out.weights
    low, high = group_bootstrap(
        held_out.labels, probability, held_out.groups, "mcc", held_out.resamples, held_out.seed, weights
    )
    return {
        "mcc": finite_or_none(metric_value(held_out.labels, probability, "mcc", weights)),
        "mcc_interval": [finite_or_none(low), finite_or_none(high)],
        "ece": finite_or_none(expected_calibration_error(held_out.labels, probability, weights=weights)),
        "log_loss": finite_or_none(log_loss(held_out.labels, probability, weights)),
    }


def compare(base: System, other: System, held_out: HeldOut) -> Paired:
    """Paired bootstrap over groups of other - base in MCC under the prior of use."""
    return paired_group_bootstrap(
        held_out.labels,
        base.probability,
        other.probability,
        held_out.groups,
        "mcc",
        held_out.resamples,
        held_out.seed,
        held_out.weights,
    )


def choose(base: System, other: System, mode: Literal["auto", "on", "off"], held_out: HeldOut) -> dict[str, Any]:
    """Whether `other` replaces `base`: forced by `on` and `off`, else only where the whole interval lies above 0."""
    paired = compare(base, other, held_out)
    use = mode == "on" or (mode == "auto" and paired.helps)
    figures = {key: finite_or_none(value) for key, value in paired._asdict().items()}
    return {"base": base.name, "other": other.name, "mode": mode, "used": bool(use), **figures}


def member_weights(log_odds: np.ndarray, held_out: HeldOut) -> np.ndarray:
    """Weights [M] on the simplex that minimise the calibrated held-out loss, drawn towards plain averaging.

    log_odds [N,M]. The pull (one pseudo-observation per nat of divergence from uniform) keeps few photos from
    choosing a single member.
    """
    number = log_odds.shape[1]
    labels, sample = held_out.labels, held_out.weights
    if number == 1 or len(np.unique(labels)) < 2:
        return np.full(number, 1.0 / number)
    sign = np.where(labels == 1, 1.0, -1.0)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        share, slope, bias = softmax(parameters[:number]), np.exp(parameters[number]), parameters[number + 1]
        voted = log_odds @ share
        margin = sign * (slope * voted + bias)
        log_ratio = np.log(np.maximum(share * number, 1e-12))
        pull = np.sum(share * log_ratio) + 0.5 * parameters[number] ** 2 + 0.5 * (bias / 2) ** 2
        outer = -sample * sign * expit(-margin)
        by_share = slope * (log_odds.T @ outer) + log_ratio
        gradient = [*(share * (by_share - share @ by_share)), slope * (outer @ voted) + parameters[number]]
        return float(np.sum(sample * np.logaddexp(0.0, -margin)) + pull), np.array([*gradient, outer.sum() + bias / 4])

    bounds = [(-5, 5)] * (number + 2)
    found = minimize(objective, np.zeros(number + 2), jac=True, method="L-BFGS-B", bounds=bounds)
    weights: np.ndarray = softmax(found.x[:number])
    return weights


def cross_fitted_ensemble(log_odds: np.ndarray, held_out: HeldOut) -> np.ndarray:
    """Weighted ensemble's probability of every photo, weights and calibration fitted without its group, [N]."""
    return held_out.cross_fitted(log_odds, lambda rows: log_odds @ member_weights(log_odds[rows], held_out.part(rows)))


def choose_weights(log_odds: np.ndarray, held_out: HeldOut) -> tuple[np.ndarray, dict[str, Any]]:
    """Plain or fitted member weights [M]: fitted only where they lower the cross-fitted loss over whole groups."""
    number = log_odds.shape[1]
    plain = np.full(number, 1.0 / number)
    if number == 1:
        return plain, {"used": False, "reason": "one member"}
    fitted = member_weights(log_odds, held_out)
    base = held_out.cross_fitted(log_odds @ plain)
    other = cross_fitted_ensemble(log_odds, held_out)
    weights = held_out.weights

    def negative_loss(rows_labels: np.ndarray, packed: np.ndarray) -> float:
        return -log_loss(rows_labels, packed, prior_weights(rows_labels, held_out.prior))

    paired = paired_group_bootstrap(
        held_out.labels, base, other, held_out.groups, negative_loss, min(held_out.resamples, 300), held_out.seed
    )
    details = {
        "plain_log_loss": finite_or_none(log_loss(held_out.labels, base, weights)),
        "weighted_log_loss": finite_or_none(log_loss(held_out.labels, other, weights)),
        "fitted_weights": fitted.tolist(),
        "used": bool(paired.helps),
        "gain": {key: finite_or_none(value) for key, value in paired._asdict().items()},
    }
    return (fitted if paired.helps else plain), details
