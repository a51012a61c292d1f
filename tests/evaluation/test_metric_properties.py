"""What holds for metrics of any answers: agreement with scikit-learn, symmetry, weights as repeated photos, no NaN in JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, matthews_corrcoef, roc_auc_score

from roadwork.evaluation import metrics

answers = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0, 1), st.sampled_from(["a", "b", "c", "d", "", None])), max_size=40
)
both_classes = answers.filter(lambda rows: len({y for y, _, _ in rows}) == 2)


def split(rows: list[tuple[int, float, str | None]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.array([y for y, _, _ in rows], dtype=int),
        np.array([p for _, p, _ in rows], dtype=float),
        np.array([g for _, _, g in rows], dtype=object),
    )


@settings(max_examples=100)
@given(both_classes)
def test_the_metrics_are_scikit_learns(rows: list) -> None:
    label, probability, _ = split(rows)
    answer = probability > 0.5
    found = metrics.table_metrics(metrics.confusion(label, probability))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(label, answer), abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(label, answer))
    assert metrics.area_under_roc(label, probability) == pytest.approx(roc_auc_score(label, probability))
    clipped = np.clip(probability, 1e-7, 1 - 1e-7)
    assert metrics.log_loss(label, probability) == pytest.approx(log_loss(label, clipped, labels=[0, 1]), rel=1e-9)


@settings(max_examples=100)
@given(answers)
def test_nothing_that_is_written_is_nan_and_every_interval_holds_its_order(rows: list) -> None:
    label, probability, group = split(rows)
    found = metrics.summary(label, probability, group, prior=0.5, n=30)
    json.dumps(found, allow_nan=False)
    assert found["n"] == len(rows) and found["positives"] == label.sum()
    assert -1 <= found["mcc"] <= 1 and (found["mcc_at_prior"] is None or -1 <= found["mcc_at_prior"] <= 1)
    assert (found["mcc_at_prior"] is None) == (len(set(label)) < 2)
    for name in ("mcc_interval", "mcc_at_prior_interval"):
        if found[name] is not None:
            assert -1 <= found[name][0] <= found[name][1] <= 1
    assert (found["mcc_interval"] is None) == (found["groups"] < 2)


def test_a_perfect_answer_has_an_interval_that_ends_at_one() -> None:
    """Weights of a prior are no whole numbers, and their products round: 1.0000000000000002 is no MCC."""
    label, group = [0] * 6 + [1], ["a"] * 5 + ["b", "a"]
    found = metrics.summary(label, np.array(label, dtype=float), group, prior=0.5, n=30)
    assert found["mcc_at_prior_interval"][1] <= 1.0


@settings(max_examples=60)
@given(both_classes)
def test_swapping_the_classes_swaps_the_table_and_keeps_the_mcc(rows: list) -> None:
    label, probability, _ = split(rows)
    probability = np.where(probability == 0.5, 0.6, probability)  # the threshold belongs to one side
    table, swapped = metrics.confusion(label, probability), metrics.confusion(1 - label, 1 - probability)
    assert swapped.tolist() == table[::-1, ::-1].tolist()
    assert metrics.mcc(swapped) == pytest.approx(metrics.mcc(table), abs=1e-12)
    assert metrics.mcc(metrics.confusion(label, 1 - probability)) == pytest.approx(-metrics.mcc(table), abs=1e-12)


@settings(max_examples=60)
@given(both_classes, st.data())
def test_a_weight_of_k_is_k_copies(rows: list, data: st.DataObject) -> None:
    label, probability, _ = split(rows)
    times = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows))))
    many = np.repeat(np.arange(len(rows)), times)
    if not len(many):
        return
    weighted = metrics.confusion(label, probability, weights=times)
    assert weighted.tolist() == metrics.confusion(label[many], probability[many]).tolist()
    assert metrics.mcc(weighted) == pytest.approx(metrics.mcc(metrics.confusion(label[many], probability[many])))
    for metric in (metrics.expected_calibration_error, metrics.log_loss):
        assert metric(label, probability, weights=times) == pytest.approx(metric(label[many], probability[many]))


@settings(max_examples=60)
@given(both_classes, st.floats(0.01, 0.99))
def test_weights_of_a_prior_give_that_prior_and_leave_each_class_alone(rows: list, prior: float) -> None:
    label, _, _ = split(rows)
    weights = metrics.prior_weights(label, prior)
    assert weights.sum() == pytest.approx(len(label)) and (weights > 0).all()
    assert np.average(label, weights=weights) == pytest.approx(prior)
    assert all(np.ptp(weights[label == c]) == 0 for c in (0, 1))


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_an_impossible_prior_is_refused(prior: float) -> None:
    with pytest.raises(ValueError, match="prior must lie between 0 and 1"):
        metrics.prior_weights([0, 1], prior)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.confusion([[0, 1]], [0.1]), "one-dimensional"),
        (lambda: metrics.confusion([0, 2], [0.1, 0.2]), "0 or 1, got 2"),
        (lambda: metrics.confusion([0, 1], [0.1, math.inf]), "1 of 2 probabilities are not finite"),
        (lambda: metrics.confusion([0, 1], [0.1, 0.2], weights=[1.0]), "2 finite numbers"),
        (lambda: metrics.confusion([0, 1], [0.1, 0.2], weights=[1.0, -1.0]), "not negative"),
        (lambda: metrics.confusion([0, 1], [0.1, 0.2], weights=[1.0, math.nan]), "finite"),
        (lambda: metrics.mcc(np.zeros((3, 3))), r"shape \(2, 2\), got \(3, 3\)"),
        (lambda: metrics.reliability_bins([1], [1.5]), "must lie in"),
        (lambda: metrics.reliability_bins([1], [-0.1]), "must lie in"),
        (lambda: metrics.group_codes(["a"], 2), "expected 2 groups"),
        (lambda: metrics.metric_value([1], [0.5], "brier"), "unknown metric 'brier'; allowed: mcc, accuracy"),
    ],
)
def test_what_cannot_be_measured_is_said(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ([[0, 0], [0, 0]], 0.0),
        ([[5, 0], [0, 5]], 1.0),
        ([[0, 5], [5, 0]], -1.0),
        ([[0, 5], [0, 5]], 0.0),
        ([[5, 5], [0, 0]], 0.0),
        ([[0.5, 0.0], [0.0, 0.25]], 1.0),
        ([[1, 1], [1, 1]], 0.0),
    ],
)
def test_mcc_at_its_ends(table: list[list[float]], value: float) -> None:
    assert metrics.mcc(np.array(table)) == value


def test_ratios_without_a_denominator_are_none() -> None:
    nothing = metrics.table_metrics(np.zeros((2, 2)))
    assert nothing["mcc"] == 0.0 and all(nothing[name] is None for name in nothing if name != "mcc")
    only_negatives = metrics.table_metrics([[3, 0], [0, 0]])
    assert only_negatives["accuracy"] == 1.0 and only_negatives["fpr"] == 0.0
    assert only_negatives["recall"] is only_negatives["precision"] is only_negatives["f1"] is None


@pytest.mark.parametrize("name", metrics.TABLE_METRICS)
def test_every_named_metric_has_an_interval_around_it(name: str) -> None:
    rng = np.random.default_rng(0)
    group = np.arange(300) // 6
    label = rng.integers(0, 2, 300)
    probability = np.clip(0.5 + 0.3 * (2 * label - 1) + 0.4 * rng.normal(size=300), 0, 1)
    low, high = metrics.group_bootstrap(label, probability, group, name, n=200)
    assert low < metrics.metric_value(label, probability, name) < high


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_swapping_the_systems_of_a_pair_turns_the_sign(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label, group = rng.integers(0, 2, 60), rng.integers(0, 8, 60)
    a, b = rng.random(60), rng.random(60)
    one, other = (metrics.paired_group_bootstrap(label, x, y, group, n=50, seed=3) for x, y in ((a, b), (b, a)))
    assert other.difference == pytest.approx(-one.difference)
    assert (other.low, other.high) == (pytest.approx(-one.high), pytest.approx(-one.low))
    assert one.share_better + other.share_better <= 1 + 1e-12


def test_groups_of_one_name_fall_together_and_nameless_photos_stand_alone() -> None:
    codes = metrics.group_codes(["x", "y", "x", None, "", math.nan, 5, "5"], 8)
    assert codes[0] == codes[2] != codes[1]
    assert len({codes[3], codes[4], codes[5]}) == 3 and codes[6] == codes[7]
    assert metrics.group_codes(None, 3).tolist() == [0, 1, 2]
    assert metrics.group_codes([], 0).shape == (0,)


def test_the_bootstrap_in_pieces_is_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks bound the memory and must not change what is drawn."""
    rng = np.random.default_rng(0)
    label, probability, group = rng.integers(0, 2, 200), rng.random(200), rng.integers(0, 20, 200)
    whole = metrics.group_bootstrap(label, probability, group, n=100, seed=1)
    monkeypatch.setattr(metrics, "_CHUNK_CELLS", 60)
    assert metrics.group_bootstrap(label, probability, group, n=100, seed=1) == whole


def test_bins_hold_every_photo_once_at_every_edge() -> None:
    edges = np.linspace(0, 1, 11)
    bins = metrics.reliability_bins(np.ones(11, int), edges, bins=10)
    assert bins.weight.sum() == 11 and bins.weight[-1] == 2, "1.0 belongs to the last bin"
    assert np.isnan(metrics.reliability_bins([], []).confidence).all()
    assert math.isnan(metrics.expected_calibration_error([], []))


@pytest.mark.parametrize(
    ("value", "kept"), [(1.5, 1.5), (0.0, 0.0), (math.nan, None), (math.inf, None), (-math.inf, None)]
)
def test_json_numbers_are_finite_or_none(value: float, kept: float | None) -> None:
    assert metrics.finite_or_none(value) == kept


def test_certain_and_wrong_costs_much_and_not_infinitely() -> None:
    assert metrics.log_loss([1], [0.0]) == pytest.approx(-math.log(1e-7))
    assert metrics.log_loss([1, 0], [1.0, 0.0]) == pytest.approx(1e-7, rel=1e-3)
    assert math.isnan(metrics.log_loss([], []))
