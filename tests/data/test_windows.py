"""The windowed order: the same draws as the global one, read from few shards at a time."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.index import ShardIndex
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder, EpochOrder, Windows
from roadwork.data.permutation import ShardPermutation
from roadwork.data.table import open_order, stream_digest
from tests.data.sheets import build

SEEDS = st.integers(-(2**63), 2**64 - 1)


@st.composite
def weights_in_shards(draw: st.DrawFn) -> tuple[list[float], Windows]:
    """Weights of up to 200 samples, some of them 0, cut anywhere into shards (even empty ones), and a window."""
    weight = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 1e3))
    weights = draw(st.lists(weight, min_size=1, max_size=200).filter(lambda w: sum(w) > 0))
    cuts = draw(st.lists(st.integers(0, len(weights)), max_size=20))
    return weights, Windows(np.asarray([0, *sorted(cuts), len(weights)]), draw(st.integers(1, 250)))


@settings(max_examples=80, deadline=None)
@given(weights_in_shards(), SEEDS, st.integers(0, 10**6), st.integers(1, 500))
def test_an_epoch_holds_the_draws_of_the_global_order(
    made: tuple[list[float], Windows], seed: int, epoch: int, draws: int
) -> None:
    weights, windows = made
    order = EpochOrder(weights, seed, epoch, draws, windows=windows)
    found = order.at(np.arange(draws))
    assert np.sort(found).tolist() == np.sort(EpochOrder(weights, seed, epoch, draws).at(np.arange(draws))).tolist()
    expected = np.asarray(weights) / sum(weights) * draws
    assert np.abs(np.bincount(found, minlength=len(weights)) - expected).max() < 1 + 1e-9
    assert order.permutation.inverse(order.permutation.forward(np.arange(draws))).tolist() == list(range(draws))


@settings(max_examples=40, deadline=None)
@given(weights_in_shards(), SEEDS, st.integers(0, 10**6))
def test_ten_epochs_are_within_two(made: tuple[list[float], Windows], seed: int, first: int) -> None:
    weights, windows = made
    n = len(weights)
    drawn = EndlessOrder(weights, seed, windows=windows).at(first * n + np.arange(10 * n))
    assert np.abs(np.bincount(drawn, minlength=n) - 10 * n * np.asarray(weights) / sum(weights)).max() < 2


@settings(max_examples=60, deadline=None)
@given(weights_in_shards(), SEEDS, st.integers(0, 10**6))
def test_a_shard_is_read_in_consecutive_windows_and_a_window_reads_few(
    made: tuple[list[float], Windows], seed: int, epoch: int
) -> None:
    """The locality that the documents state."""
    weights, windows = made
    order = EpochOrder(weights, seed, epoch, windows=windows)
    shard = np.searchsorted(windows.edges, order.at(np.arange(len(weights))), side="right") - 1
    window = np.arange(len(weights)) // windows.size
    opened = 0
    for number in np.unique(shard):
        inside = np.unique(window[shard == number])
        assert (np.diff(inside) == 1).all()
        opened += len(inside)
    drawn, draws = np.unique(shard, return_counts=True)
    assert opened <= len(drawn) + window[-1]
    for number in range(int(window[-1]) + 1):
        read = len(np.unique(shard[window == number]))
        assert read <= 2 + math.ceil(max(windows.size - 2, 0) / draws.min())


@settings(max_examples=15, deadline=None)
@given(weights_in_shards(), SEEDS, st.integers(0, 10**9), st.integers(1, 40))
def test_any_slicing_reads_the_same_stream(
    made: tuple[list[float], Windows], seed: int, start: int, length: int
) -> None:
    weights, windows = made
    stream = EndlessOrder(weights, seed, windows=windows)
    positions = np.arange(start, start + length)
    whole = stream.at(positions)
    assert whole[:4].tolist() == [
        int(EndlessOrder(weights, seed, windows=windows).at(p)) for p in positions[:4].tolist()
    ]
    for rank in range(3):
        assert stream.at(positions[rank::3]).tolist() == whole[rank::3].tolist()


def test_it_is_shuffled_within_windows_and_between_shards() -> None:
    n, size = 20_000, 1000
    edges = np.arange(0, n + 1, 100)
    orders = [
        EpochOrder(np.ones(n), s, e, windows=Windows(edges, size)).at(np.arange(n)) for s, e in ((0, 0), (0, 1), (1, 0))
    ]
    for i, a in enumerate(orders):
        first = a.reshape(-1, size)
        assert abs(np.corrcoef(first[:, 1:].ravel() % 100, first[:, :-1].ravel() % 100)[0, 1]) < 0.03
        assert abs(np.corrcoef(first[3], np.sort(first[3]))[0, 1]) < 0.1
        assert abs(np.corrcoef(first.mean(axis=1), np.arange(n // size))[0, 1]) < 0.6
        for b in orders[:i]:
            assert (a == b).mean() < 0.002
    ranks = [np.argsort(np.argsort(window)) for window in orders[0].reshape(-1, size)]
    for a, b in zip(ranks, ranks[1:], strict=False):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15, "two windows are shuffled alike"


def test_golden_values() -> None:
    """A change here changes every windowed run's data order: a deliberate act that must be told in the release notes."""
    weights = np.asarray([5, 2.5, 0, 1, 0.3, 1, 1, 2.5])
    assert EpochOrder(weights, 0, 0, windows=Windows(np.asarray([0, 3, 3, 5, 8]), 3)).at(range(8)).tolist() == [
        5,
        7,
        7,
        0,
        0,
        3,
        0,
        1,
    ]
    stream = EndlessOrder(np.arange(1, 1001) / 7.0, 20261123, windows=Windows(np.arange(0, 1001, 50), 200))
    assert stream.at([0, 1, 2, 999, 1000, 123456789]).tolist() == [791, 776, 438, 747, 997, 882]


def test_any_position_of_a_large_set_is_found_and_undone() -> None:
    n, rng = 10**9, np.random.default_rng(0)
    bounds = np.concatenate([[0], np.sort(rng.integers(0, n + 1, 50_000)), [n]])
    permutation = ShardPermutation(bounds, 8192, 7)
    x = np.concatenate([[0, n - 1, n - n % 8192 - 1, n - n % 8192], rng.integers(0, n, 5000)])
    y = permutation.forward(x)
    assert (y >= 0).all() and (y < n).all() and (permutation.inverse(y) == x).all()


def test_a_split_opens_its_windows_and_the_loader_reads_few_shards_at_a_time(tmp_path: Path) -> None:
    index = ShardIndex.open(build(tmp_path / "shards", {"train": 96}), "train")
    order = open_order(index, 3, weighted=False, window=16)
    loader = TrainLoader(index, order, global_batch=8, micro_batch=8, workers=2, end_position=96)
    rows = [batch.sample.tolist() for batch in loader]
    assert sorted(row for batch in rows for row in batch) == list(range(96))
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert len(np.unique(index.shard[first + second])) == 2, "a window of two shards' photos reads others"
    assert (order.at(np.arange(96)) != open_order(index, 3, weighted=False).at(np.arange(96))).any()


def test_the_stream_has_a_digest_of_what_it_draws_from(tmp_path: Path) -> None:
    first, again = (ShardIndex.open(build(tmp_path / name), "train") for name in "ab")
    assert stream_digest(first) == stream_digest(again) != stream_digest(again, weighted=False)
    even = stream_digest(again, weighted=False)
    again.gps_weight[3] += 1
    assert stream_digest(first) != stream_digest(again)
    assert even == stream_digest(again, weighted=False)
    assert stream_digest(ShardIndex.open(build(tmp_path / "c", per_shard=7), "train")) != stream_digest(first)


@pytest.mark.parametrize(("edges", "size"), [([0, 4], 0), ([0], 3), ([1, 4], 3), ([0, 3, 2, 4], 3), ([0, 3], 2)])
def test_windows_that_do_not_fit_are_refused(edges: list[int], size: int) -> None:
    with pytest.raises(ValueError, match="edges"):
        EpochOrder(np.ones(4), 0, 0, windows=Windows(np.asarray(edges), size))
