"""Paired differences: the metrics are the usual ones, and the interval knows of groups and seeds."""

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from benchmarks.paired import Trial, paired_difference, weighted_auc, weighted_mcc


def drawn(seed, n=300, groups=40):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    return rng, label, np.array([f"{seed}-{g}" for g in rng.integers(0, groups, n)])


def test_weighted_metrics_are_those_of_scikit_learn():
    rng, label, _ = drawn(0)
    probability = np.round(np.clip(0.3 * label + 0.7 * rng.random(len(label)), 0, 1), 2)  # with ties
    weights = rng.integers(0, 4, (5, len(label))).astype(float)
    auc, mcc = weighted_auc(label, probability, weights), weighted_mcc(label, probability, weights)
    for row, w in enumerate(weights):
        assert auc[row] == pytest.approx(roc_auc_score(label, probability, sample_weight=w), abs=1e-12)
        assert mcc[row] == pytest.approx(matthews_corrcoef(label, probability > 0.5, sample_weight=w), abs=1e-12)


def trial(seed, better):
    rng, label, group = drawn(seed)
    noise = rng.normal(0, 1, len(label))
    weak, strong = (1 / (1 + np.exp(-((2 * label - 1) * scale + noise))) for scale in (0.5, 0.5 + better))
    return Trial(label, group, strong[None], weak[None])


def test_a_real_gain_is_shown_and_its_loss_too():
    trials = [trial(seed, 1.0) for seed in range(4)]
    for metric in ("mcc", "auc"):
        gain = paired_difference(trials, metric, 300)
        assert gain.low > 0 and gain.low < gain.value < gain.high and gain.verdict == "helps"
        turned = [Trial(t.label, t.group, t.without, t.with_it) for t in trials]
        assert paired_difference(turned, metric, 300).verdict == "harms"


def test_the_same_answers_differ_by_nothing():
    assert paired_difference([trial(seed, 0.0) for seed in range(3)], "mcc", 100) == (0.0, 0.0, 0.0)


def test_the_interval_knows_of_the_seeds():
    """Two seeds that say opposite things: nothing is shown, however many photos agree within each."""
    good, other = trial(0, 3.0), trial(1, 3.0)
    bad = Trial(other.label, other.group, other.without, other.with_it)
    assert paired_difference([good, bad], "mcc", 300).verdict == "not shown"
    assert paired_difference([good], "mcc", 300).verdict == "helps"


def test_few_seeds_are_not_taken_for_many():
    """The interval's width is that of the mean of n seeds that differ, not (n - 1) / n of its variance."""
    rng = np.random.default_rng(0)
    label, group = rng.integers(0, 2, 400), np.arange(400).astype(str)
    right = np.where(label == 1, 0.9, 0.1)
    gains = (0.3, 0.5, 0.7)  # of answers that a seed gets wrong without the component
    trials = []
    for gain in gains:
        wrong = rng.random(400) < gain / 2
        trials.append(Trial(label, group, right[None], np.where(wrong, 1 - right, right)[None]))
    values = [paired_difference([one], "mcc", 10).value for one in trials]
    found = paired_difference(trials, "mcc", 4000)
    expected = np.std(values, ddof=1) / np.sqrt(len(values))
    width = (found.high - found.low) / (2 * 1.96)
    assert width > 0.95 * expected


def test_the_interval_knows_of_groups():
    """Photos of one video are one observation: copying each photo ten times within its group narrows nothing."""
    one = trial(0, 0.4)
    many = Trial(*(np.repeat(part, 10, axis=-1) for part in (one.label, one.group, one.with_it, one.without)))
    a, b = (paired_difference([t], "auc", 400) for t in (one, many))
    assert b.high - b.low == pytest.approx(a.high - a.low, rel=0.02)


def test_one_group_gives_no_interval():
    one = trial(0, 1.0)
    alone = Trial(one.label, np.full(len(one.label), "g"), one.with_it, one.without)
    gain = paired_difference([alone], "mcc", 50)
    assert gain.value > 0 and np.isnan(gain.low) and gain.verdict == "not shown"


def test_several_networks_of_a_side_are_averaged():
    one = trial(0, 1.0)
    both = Trial(one.label, one.group, np.concatenate([one.with_it, one.without]), one.without)
    assert paired_difference([both], "mcc", 20).value == pytest.approx(paired_difference([one], "mcc", 20).value / 2)
