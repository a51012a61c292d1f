"""The ablation's arithmetic beside scikit-learn and beside counting pairs by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from benchmarks.paired import Difference, Trial, paired_difference, weighted_auc, weighted_mcc
from roadwork.evaluation import metrics

answered = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9])), min_size=1, max_size=30)


@settings(max_examples=100)
@given(answered)
def test_the_area_counts_pairs_and_ties_by_half(rows: list[tuple[int, float]]) -> None:
    label, probability = np.array([y for y, _ in rows]), np.array([p for _, p in rows])
    found = weighted_auc(label, probability, np.ones((1, len(rows))))[0]
    positive, negative = probability[label == 1], probability[label == 0]
    if not len(positive) or not len(negative):
        assert math.isnan(found)
        return
    pairs = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    assert found == pytest.approx(pairs / (len(positive) * len(negative)))
    assert found == pytest.approx(roc_auc_score(label, probability))


@settings(max_examples=60)
@given(answered, st.data())
def test_weights_are_copies_for_both_metrics(rows: list[tuple[int, float]], data: st.DataObject) -> None:
    label, probability = np.array([y for y, _ in rows]), np.array([p for _, p in rows])
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))), dtype=float)
    copies = np.repeat(np.arange(len(rows)), times.astype(int))
    for measure in (weighted_mcc, weighted_auc):
        one = measure(label, probability, times[None])[0]
        if len(copies):
            other = measure(label[copies], probability[copies], np.ones((1, len(copies))))[0]
            assert one == pytest.approx(other, nan_ok=True)
    many = weighted_mcc(label, probability, np.stack([times, np.ones(len(rows))]))
    assert many[1] == pytest.approx(metrics.mcc(metrics.confusion(label, probability)))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "helps"), (-0.2, -0.01, "harms"), (-0.1, 0.1, "not shown"), (0.0, 0.1, "not shown"),
        (-0.1, 0.0, "not shown"), (math.nan, math.nan, "not shown"),
    ],
)  # fmt: skip
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Difference(0.05, low, high).verdict == verdict


def trial(seed: int, gain: float, networks: int = 1, photos: int = 120, groups: int = 20) -> Trial:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, photos)
    noise = rng.normal(size=(2, networks, photos))
    odds = [(2 * label - 1) * strength + noise[k] for k, strength in enumerate((1.0 + gain, 1.0))]
    with_it, without = (1 / (1 + np.exp(-o)) for o in odds)
    return Trial(label, np.array([f"v{i % groups}" for i in range(photos)]), with_it, without)


@pytest.mark.parametrize("metric", ["mcc", "auc"])
def test_the_value_is_the_plain_mean_of_the_seeds(metric: str) -> None:
    trials = [trial(seed, 0.7, networks=3) for seed in range(4)]
    found = paired_difference(trials, metric, resamples=200)

    def score(one: Trial, rows: np.ndarray) -> float:
        if metric == "mcc":
            return float(np.mean([metrics.mcc(metrics.confusion(one.label, p)) for p in rows]))
        return float(np.mean([roc_auc_score(one.label, p) for p in rows]))

    by_hand = np.mean([score(t, t.with_it) - score(t, t.without) for t in trials])
    assert found.value == pytest.approx(by_hand) and found.low < found.value < found.high
    assert found == paired_difference(trials, metric, resamples=200)


def test_turning_the_sides_turns_the_interval() -> None:
    trials = [trial(seed, 0.5) for seed in range(3)]
    turned = [Trial(t.label, t.group, t.without, t.with_it) for t in trials]
    one, other = paired_difference(trials, resamples=300), paired_difference(turned, resamples=300)
    assert other.value == pytest.approx(-one.value)
    assert (other.low, other.high) == (pytest.approx(-one.high), pytest.approx(-one.low))


def test_more_photos_give_a_narrower_interval() -> None:
    few = paired_difference([trial(seed, 0.5, photos=60, groups=10) for seed in range(3)], resamples=300)
    many = paired_difference([trial(seed, 0.5, photos=2400, groups=400) for seed in range(3)], resamples=300)
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_a_seed_of_one_group_leaves_the_interval_to_the_others() -> None:
    alone = paired_difference([trial(0, 0.5, groups=1)], resamples=50)
    assert math.isnan(alone.low) and alone.verdict == "not shown" and math.isfinite(alone.value)
