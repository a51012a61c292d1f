"""Metrics against hand-computed cases, scikit-learn and simulation."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score

from roadwork.evaluation import metrics


def draw(n=400, seed=0, groups=40, skill=1.5):
    """Labels, probabilities and groups whose photos share a group effect, as frames of one video do."""
    rng = np.random.default_rng(seed)
    group = rng.integers(groups, size=n)
    label = (rng.random(groups) < 0.5)[group].astype(int)
    logit = skill * (2 * label - 1) + 2.0 * rng.normal(size=groups)[group] + 0.3 * rng.normal(size=n)
    return label, 1 / (1 + np.exp(-logit)), np.array([f"v{g}" for g in group])


def test_confusion_and_mcc_by_hand():
    table = metrics.confusion([1, 1, 1, 0, 0, 0, 0, 1], [0.9, 0.8, 0.2, 0.1, 0.7, 0.3, 0.4, 0.6])
    assert table.tolist() == [[3, 1], [1, 3]]
    assert metrics.mcc(table) == pytest.approx((9 - 1) / 16)


def test_mcc_and_ratios_equal_scikit_learn():
    label, probability, _ = draw()
    values = metrics.table_metrics(metrics.confusion(label, probability))
    answer = probability > 0.5
    assert values["mcc"] == pytest.approx(matthews_corrcoef(label, answer), abs=1e-12)
    assert values["precision"] == pytest.approx(precision_score(label, answer))
    assert values["recall"] == values["tpr"] == pytest.approx(recall_score(label, answer))
    assert values["f1"] == pytest.approx(f1_score(label, answer))


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], []])
def test_one_class_or_none_is_a_stated_result(labels):
    probability = [0.9, 0.2, 0.8][: len(labels)]
    table = metrics.confusion(labels, probability)
    assert table.shape == (2, 2) and table.sum() == len(labels)
    assert metrics.mcc(table) == 0.0
    result = metrics.summary(labels, probability, prior=0.5, n=20)
    assert result["mcc"] == 0.0 and result["auc"] is None
    assert result["mcc_at_prior"] is None and result["ece_at_prior"] is None, "one class has no other share"
    json.dumps(result, allow_nan=False)


def test_constant_answers_have_mcc_zero():
    assert metrics.mcc(metrics.confusion([0, 1, 1], [0.9, 0.9, 0.9])) == 0.0


def test_mcc_does_not_overflow():
    big = np.array([[10**12, 10**6], [10**6, 10**12]], dtype=np.int64)
    assert metrics.mcc(big) == pytest.approx((10**12 - 10**6) / (10**12 + 10**6), rel=1e-12)


def test_threshold_is_exclusive_as_rounding_is():
    assert metrics.confusion([1, 0], [0.5, 0.5]).tolist() == [[1, 0], [1, 0]]


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="0 or 1, got -1"):
        metrics.confusion([1, -1], [0.1, 0.2])
    with pytest.raises(ValueError, match="expected 2 probabilities"):
        metrics.confusion([1, 0], [0.1])
    with pytest.raises(ValueError, match="not finite"):
        metrics.confusion([1, 0], [0.1, math.nan])
    with pytest.raises(ValueError, match="unknown metric 'mmc'"):
        metrics.group_bootstrap([1, 0], [0.1, 0.2], None, "mmc")


def test_bootstrap_over_groups_is_wider_than_over_photos_and_holds_the_value():
    label, probability, group = draw()
    value = metrics.metric_value(label, probability)
    by_group = metrics.group_bootstrap(label, probability, group, seed=1)
    by_photo = metrics.group_bootstrap(label, probability, None, seed=1)
    assert by_group.low < value < by_group.high
    assert by_group.high - by_group.low > 1.5 * (by_photo.high - by_photo.low)
    assert by_group == metrics.group_bootstrap(label, probability, group, seed=1)
    assert by_group != metrics.group_bootstrap(label, probability, group, seed=2)


def test_named_metric_and_function_give_the_same_interval():
    label, probability, group = draw(n=200)
    named = metrics.group_bootstrap(label, probability, group, "accuracy", n=400, seed=3)
    written = metrics.group_bootstrap(
        label, probability, group, lambda y, p: float(((p > 0.5) == y).mean()), n=400, seed=3
    )
    assert named == pytest.approx(written, abs=0.03)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    truth = metrics.metric_value(*draw(n=40000, groups=4000, seed=99)[:2])
    hits = 0
    for seed in range(60):
        label, probability, group = draw(n=400, groups=60, seed=seed)
        low, high = metrics.group_bootstrap(label, probability, group, n=200, seed=seed)
        hits += low <= truth <= high
    assert 50 <= hits <= 60


def test_one_group_has_no_interval():
    assert all(math.isnan(end) for end in metrics.group_bootstrap([0, 1], [0.1, 0.9], ["a", "a"]))
    paired = metrics.paired_group_bootstrap([0, 1], [0.9, 0.1], [0.1, 0.9], ["a", "a"])
    assert paired.difference == 2.0 and not paired.helps


def test_unnamed_groups_are_one_group_per_photo():
    assert len(set(metrics.group_codes(["a", "", None, float("nan"), "a", ""], 6))) == 5


def test_paired_bootstrap_sees_a_gain_that_separate_intervals_hide():
    label, probability, group = draw(n=600, groups=60, skill=0.8)
    better = np.clip(probability + 0.06 * (2 * label - 1), 0, 1)
    paired = metrics.paired_group_bootstrap(label, probability, better, group, seed=0)
    a = metrics.group_bootstrap(label, probability, group)
    b = metrics.group_bootstrap(label, better, group)
    assert paired.difference > 0 and paired.helps and paired.share_better > 0.97
    assert a.high > b.low
    same = metrics.paired_group_bootstrap(label, probability, probability, group)
    assert same[:3] == (0.0, 0.0, 0.0) and not same.helps


def test_prior_weights_move_the_prior_and_the_metric():
    rng = np.random.default_rng(0)
    label = (rng.random(20000) < 0.8).astype(int)
    probability = np.clip(0.5 + 0.2 * (2 * label - 1) + 0.25 * rng.normal(size=len(label)), 0, 1)
    weights = metrics.prior_weights(label, 0.5)
    assert weights.sum() == pytest.approx(len(label))
    assert np.average(label, weights=weights) == pytest.approx(0.5)
    keep = np.concatenate([np.flatnonzero(label == 0), np.flatnonzero(label == 1)[: (label == 0).sum()]])
    balanced = metrics.mcc(metrics.confusion(label[keep], probability[keep]))
    assert metrics.mcc(metrics.confusion(label, probability, weights=weights)) == pytest.approx(balanced, abs=0.02)
    assert metrics.prior_weights([1, 1], 0.5).tolist() == [1.0, 1.0]


def test_calibration_error_by_hand_and_of_calibrated_answers():
    assert metrics.expected_calibration_error([1, 0, 1, 1], [0.95, 0.95, 0.15, 0.15], bins=10) == pytest.approx(
        0.5 * abs(0.95 - 0.5) + 0.5 * abs(0.15 - 1.0)
    )
    rng = np.random.default_rng(0)
    probability = rng.random(50000)
    label = (rng.random(50000) < probability).astype(int)
    assert metrics.expected_calibration_error(label, probability) < 0.01
    assert metrics.expected_calibration_error(label, probability**3) > 0.1
    bins = metrics.reliability_bins(label, probability, bins=5)
    assert bins.weight.sum() == 50000 and bins.confidence == pytest.approx(bins.positives, abs=0.02)
    assert metrics.reliability_bins([1], [1.0], bins=5).weight.tolist() == [0, 0, 0, 0, 1]
