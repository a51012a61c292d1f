"""What holds for every filter, vote, distance, calibration and choice, whatever the answers are."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import mahalanobis
from scipy.special import expit, logit

from roadwork.evaluation.metrics import log_loss
from roadwork.inference import ood
from roadwork.inference.calibration import Calibration, analytic_shift, fit_calibration, group_cross_fit
from roadwork.inference.ensemble import (
    HeldOut,
    System,
    assess,
    choose,
    choose_weights,
    cross_fitted_ensemble,
    member_weights,
)
from roadwork.inference.foods import TEMPERATURES, Selection, combine, fit_temperature, select, weights
from roadwork.inference.ood import Neighbours, ShrunkGaussian, TrainingDistribution

distances = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(2, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(0, 5))
)


# ----------------------------------------------------------------------------------------------------- foods


@settings(max_examples=100)
@given(distances, st.sampled_from(["knn", "mahalanobis"]), st.sampled_from(["threshold", "ratio"]), st.floats(0.01, 1))
def test_the_original_always_stays_and_weights_are_shares(found: np.ndarray, kind, keep, ratio: float) -> None:  # type: ignore[no-untyped-def]
    selection = select(found, kind, keep, ratio)
    assert selection.kept[:, 0].all() and selection.kept.dtype == bool
    for temperature in TEMPERATURES:
        share = weights(selection, temperature)
        np.testing.assert_allclose(share.sum(axis=1), 1.0)
        assert (share >= 0).all() and not share[~selection.kept].any()
    even = weights(selection, math.inf)
    np.testing.assert_allclose(even, selection.kept / selection.kept.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("augmentations", range(1, 17))
def test_a_ratio_keeps_the_number_that_it_says(augmentations: int) -> None:
    """ceil(ratio * A), in exact arithmetic: 0.07 * 100 is 7.000000000000001 for a processor."""
    found = np.random.default_rng(0).random((3, augmentations, 2))
    for percent in range(1, 101):
        expected = max(1, math.ceil(Fraction(percent, 100) * augmentations))
        kept = select(found, "knn", "ratio", percent / 100).kept
        assert kept.sum(axis=1).tolist() == [expected] * 3, f"{percent} % of {augmentations}"


def test_ties_go_to_the_earlier_augmentation() -> None:
    kept = select(np.ones((1, 6, 2)), "knn", "ratio", 0.5).kept
    assert kept.tolist() == [[True, True, True, False, False, False]]


@settings(max_examples=100)
@given(arrays(np.float64, (3, 4), elements=st.floats(-15, 15)), arrays(np.float64, (3, 4), elements=st.floats(0.01, 1)))
def test_a_vote_lies_between_its_voters(log_odds: np.ndarray, raw: np.ndarray) -> None:
    share = raw / raw.sum(axis=1, keepdims=True)
    voted = combine(log_odds, share)
    assert np.isfinite(voted).all()
    slack = 1e-6 * (1 + np.abs(log_odds).max())
    assert (voted >= log_odds.min(axis=1) - slack).all() and (voted <= log_odds.max(axis=1) + slack).all()
    np.testing.assert_allclose(expit(voted), (share * expit(log_odds)).sum(axis=1), atol=1e-9)


def test_members_vote_each_for_itself() -> None:
    log_odds = np.random.default_rng(0).normal(size=(5, 4, 3))
    share = np.full((5, 4), 0.25)
    together = combine(log_odds, share)
    for member in range(3):
        np.testing.assert_allclose(together[:, member], combine(log_odds[..., member], share), rtol=1e-12)


@pytest.mark.parametrize("extreme", [800.0, -800.0, 1e6])
def test_votes_of_certain_answers_are_finite(extreme: float) -> None:
    voted = combine(np.array([[extreme, extreme], [extreme, -extreme]]), np.full((2, 2), 0.5))
    assert np.isfinite(voted).all() and np.sign(voted[0]) == np.sign(extreme)
    assert voted[1] == pytest.approx(0.0, abs=1e-9)


def test_equal_scores_choose_the_plainest_vote() -> None:
    selection = Selection(np.ones((2, 3), bool), np.arange(6.0).reshape(2, 3))
    best, table = fit_temperature(selection, np.zeros((2, 3)), lambda odds: 1.0)
    assert best == math.inf and [t for t, _ in table] == list(TEMPERATURES)


# ------------------------------------------------------------------------------------------------------- ood


@settings(max_examples=30)
@given(st.integers(6, 40), st.integers(1, 10), st.integers(0, 1000))
def test_distances_do_not_depend_on_where_the_origin_lies(number: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, queries, shift = rng.normal(size=(number, width)), rng.normal(size=(7, width)), rng.normal(size=width) * 10
    for model in (Neighbours, ShrunkGaussian):
        here, there = model.fit(rows), model.fit(rows + shift)
        np.testing.assert_allclose(here.distance(queries), there.distance(queries + shift), rtol=1e-5, atol=1e-5)
        assert here.threshold >= 0 and np.isfinite(here.threshold)


def test_the_gaussian_is_scipys_mahalanobis() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))
    model = ShrunkGaussian.fit(rows)
    inverse = np.linalg.inv(model.lower @ model.lower.T)
    queries = rng.normal(size=(5, 4))
    expected = [mahalanobis(query, model.mean, inverse) for query in queries]
    np.testing.assert_allclose(model.distance(queries), expected, rtol=1e-8)


def test_the_share_beyond_the_threshold_is_the_stated_one() -> None:
    rows = np.random.default_rng(0).normal(size=(1000, 8))
    for model, own in ((Neighbours.fit(rows, k=3), True), (ShrunkGaussian.fit(rows), False)):
        beyond = model._nearest(rows, True) if own else model.distance(rows)  # type: ignore[union-attr]
        assert (beyond > model.threshold).mean() == pytest.approx(0.05, abs=0.002)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(50, 6)), rng.normal(size=(40, 6))
    whole = Neighbours.fit(rows)
    monkeypatch.setattr(ood, "QUERY_ROWS", 7)
    pieces = Neighbours.fit(rows)
    assert pieces.threshold == pytest.approx(whole.threshold)
    np.testing.assert_allclose(pieces.distance(queries), whole.distance(queries))


@pytest.mark.parametrize("model", [Neighbours, ShrunkGaussian])
def test_one_photo_is_no_distribution(model) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="at least 2 training features, got 1"):
        model.fit(np.zeros((1, 4)))


@pytest.mark.parametrize("rows", [np.zeros((5, 3)), np.repeat(np.arange(3.0)[None], 4, axis=0)])
def test_training_photos_that_are_all_alike_give_finite_distances(rows: np.ndarray) -> None:
    fitted = TrainingDistribution.fit((rows, rows, rows), k=2)
    found = fitted.distances((rows, rows, rows + 1))
    assert found.shape == (len(rows), 4) and np.isfinite(found).all()


def test_a_distribution_is_told_by_its_digest() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 5))
    depths = (rows, rows * 2, rows + 1)
    digest = TrainingDistribution.fit(depths, 3).digest
    assert TrainingDistribution.fit(tuple(d + 1e-9 for d in depths), 3).digest == digest, "rounding of the last bits"
    assert TrainingDistribution.fit(depths[::-1], 3).digest != digest


# ----------------------------------------------------------------------------------------------- calibration


@settings(max_examples=100)
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_shifts_of_the_prior_add_up_and_are_bayes(a: float, b: float, c: float) -> None:
    assert analytic_shift(a, a) == 0
    assert analytic_shift(a, b) + analytic_shift(b, c) == pytest.approx(analytic_shift(a, c), abs=1e-9)
    p = 0.3  # under prior a; Bayes' rule moves the odds by the ratio of the priors' odds
    odds = p / (1 - p) * (b / (1 - b)) / (a / (1 - a))
    assert Calibration(1.0, analytic_shift(a, b)).probability(np.array([logit(p)]))[0] == pytest.approx(
        odds / (1 + odds)
    )


@pytest.mark.parametrize(("prior", "odds"), [(0.5, 0.0), (0.0, -6.9), (1.0, 6.9), (0.8, math.log(4))])
def test_a_shift_from_a_prior_that_was_measured_is_finite(prior: float, odds: float) -> None:
    assert analytic_shift(prior, 0.5) == pytest.approx(-odds, abs=0.01)


@settings(max_examples=25)
@given(st.integers(0, 500), st.floats(0.2, 5), st.floats(-3, 3))
def test_calibration_keeps_the_order_of_answers(seed: int, spread: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(80) % 2
    log_odds = spread * (2 * labels - 1 + rng.normal(size=80)) + offset
    fit = fit_calibration(log_odds, labels, prior=0.5, source_prior=0.5)
    assert fit.calibration.temperature > 0 and math.isfinite(fit.calibration.bias)
    assert np.array_equal(np.argsort(fit.calibration.log_odds(log_odds)), np.argsort(log_odds))
    before, after = (log_loss(labels, expit(z)) for z in (log_odds, fit.calibration.log_odds(log_odds)))
    assert after <= before + 0.02


def test_each_group_is_scored_by_a_fit_without_it() -> None:
    groups = np.array(["a", "a", "b", "c", "c", "d"])
    seen: list[tuple[set[str], set[str]]] = []

    def fit(rows: np.ndarray):  # type: ignore[no-untyped-def]
        def score(outside: np.ndarray) -> np.ndarray:
            seen.append((set(groups[rows]), set(groups[outside])))
            return outside.astype(float)

        return score

    assert group_cross_fit(fit, groups, folds=3).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(seen) == 3 and all(not fitted & scored for fitted, scored in seen)


# ------------------------------------------------------------------------------------------------- ensembles


def truth(n: int = 200, seed: int = 0) -> HeldOut:
    rng = np.random.default_rng(seed)
    groups = np.arange(n) // 4
    return HeldOut((rng.random(n // 4) < 0.6).astype(int).repeat(4), groups.astype(str), 0.5, 0.6, 60, seed)


def system(name: str, probability: np.ndarray) -> System:
    return System(name, Calibration(), probability, {})


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
@pytest.mark.parametrize("better", [True, False])
def test_a_system_replaces_another_where_it_may(mode, better: bool) -> None:  # type: ignore[no-untyped-def]
    held_out = truth()
    rng = np.random.default_rng(1)
    weak = expit((2 * held_out.labels - 1) * 0.5 + rng.normal(size=200))
    other = np.clip(held_out.labels * 0.8 + 0.1, 0, 1) if better else weak
    found = choose(system("a", weak), system("b", other), mode, held_out)
    assert found["used"] is (mode == "on" or (mode == "auto" and better))
    assert (found["base"], found["other"], found["mode"]) == ("a", "b", mode)


@pytest.mark.parametrize("members", [1, 2, 5])
def test_weights_of_members_are_shares(members: int) -> None:
    held_out = truth()
    odds = np.random.default_rng(0).normal(size=(200, members)) + (2 * held_out.labels - 1)[:, None]
    found = member_weights(odds, held_out)
    assert found.shape == (members,) and (found >= 0).all() and found.sum() == pytest.approx(1)
    probability = cross_fitted_ensemble(odds, held_out)
    assert probability.shape == (200,) and ((probability > 0) & (probability < 1)).all()


def test_without_two_classes_members_weigh_the_same_and_nothing_is_nan() -> None:
    for labels in (np.zeros(8, int), np.ones(8, int), np.zeros(0, int)):
        held_out = HeldOut(labels, np.arange(len(labels)).astype(str), 0.5, 0.8, 20, 0)
        odds = np.random.default_rng(0).normal(size=(len(labels), 3))
        chosen, details = choose_weights(odds, held_out)
        assert chosen.tolist() == [1 / 3] * 3 and details["used"] is False
        figures = assess("a", odds[:, 0], held_out).figures
        assert figures["fitted"] is False and "fewer than two classes" in figures["reason"]


def test_the_order_of_members_means_nothing() -> None:
    held_out = truth()
    odds = np.random.default_rng(3).normal(size=(200, 3)) + (2 * held_out.labels - 1)[:, None] * [2.0, 0.5, 0.1]
    order = [2, 0, 1]
    np.testing.assert_allclose(
        member_weights(odds, held_out)[order], member_weights(odds[:, order], held_out), atol=0.02
    )
