"""Orders at their edges: zeros among the weights, weights in pieces, tiny sets, steps larger than an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data import order as order_module
from roadwork.data.order import EndlessOrder, EpochOrder, Permutation, cumulative_table
from roadwork.errors import UserError


def test_the_first_bad_weight_is_named_by_its_number_in_whichever_piece_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order_module, "_CHUNK", 8)
    for at in (0, 7, 8, 21, 99):
        weights = np.ones(100)
        weights[at] = np.nan
        weights[99] = -1.0 if at != 99 else np.nan
        with pytest.raises(UserError, match=rf"sample {at} is nan"):
            cumulative_table(weights)
    assert np.array_equal(cumulative_table(np.ones(100)), np.arange(1.0, 101.0))


def test_running_sums_do_not_drift_however_many_there_are() -> None:
    """In draws: what rounding moves the end of a stretch by. One draw too many is a photo drawn twice."""
    photos = 5_000_000
    table = cumulative_table(np.full(photos, 0.3))
    assert np.abs(table / table[-1] * photos - np.arange(1, photos + 1)).max() < 1e-8
    weights = np.random.default_rng(0).choice([0.0, 1e-9, 0.3, 5.0], photos)
    assert (np.diff(cumulative_table(weights)) >= 0).all()


def test_the_remedy_is_named_with_the_fault() -> None:
    with pytest.raises(UserError, match=r"mend it and run `python -m shards.reweight` again"):
        cumulative_table([1.0, -np.inf])


@settings(max_examples=60)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=40), st.integers(0, 10**9), st.data())
def test_a_single_zero_is_never_drawn_wherever_it_stands(weights: list[float], seed: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(weights) - 1))
    weights[at] = 0.0
    drawn = EndlessOrder(weights, seed).at(np.arange(12 * len(weights)))
    assert at not in drawn and drawn.min() >= 0 and drawn.max() < len(weights)


@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_positive_weight_among_zeros_takes_every_draw(place: int) -> None:
    weights = np.zeros(1000)
    weights[place] = 1e-300
    assert (EndlessOrder(weights, 3).at(np.arange(2500)) == place).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, bool])
def test_weights_of_any_kind_of_number_draw_the_same(dtype: type) -> None:
    weights = np.array([1, 0, 1, 1, 0, 1]).astype(dtype)
    expected = EpochOrder([1.0, 0, 1, 1, 0, 1], 5, 2).at(np.arange(6))
    assert np.array_equal(EpochOrder(weights, 5, 2).at(np.arange(6)), expected)


@settings(max_examples=100)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=50), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_only_the_ratio_of_weights_counts(weights: list[float], seed: int, scale: float) -> None:
    """Counts per epoch, not the order to the last draw: the scaled sums round differently."""
    n = len(weights)
    one, other = (
        np.bincount(EpochOrder(np.array(weights) * s, seed, 0).at(np.arange(n)), minlength=n) for s in (1, scale)
    )
    assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize(("n", "step"), [(1, 8), (3, 8), (5, 12), (7, 7), (8, 3), (10, 4)])
def test_every_step_of_the_endless_stream_is_full(n: int, step: int) -> None:
    """Also where a step is larger than the epoch, or does not divide it; ten epochs hold each sample ten times."""
    stream = EndlessOrder(np.ones(n), 1)
    steps = [stream.at(np.arange(t * step, (t + 1) * step)) for t in range(10 * n)]
    assert all(len(samples) == step and samples.min() >= 0 and samples.max() < n for samples in steps)
    whole = np.concatenate(steps)
    assert np.array_equal(np.bincount(whole[: 10 * n], minlength=n), np.full(n, 10))


def test_positions_keep_their_shape() -> None:
    epoch, stream = EpochOrder(np.ones(20), 0, 0), EndlessOrder(np.ones(20), 0)
    for source in (epoch, stream):
        flat = source.at(np.arange(12))
        assert np.array_equal(source.at(np.arange(12).reshape(3, 4)), flat.reshape(3, 4))
        assert source.at(7).shape == () and int(source.at(7)) == flat[7]
        assert source.at([]).shape == (0,)
        assert flat.dtype == np.int64
    assert len(epoch) == len(stream) == 20


def test_an_epoch_may_have_more_or_fewer_draws_than_samples() -> None:
    for draws in (1, 5, 60, 61):
        count = np.bincount(EpochOrder(np.ones(20), 4, 0, draws).at(np.arange(draws)), minlength=20)
        assert count.sum() == draws and np.ptp(count) <= 1


@pytest.mark.parametrize(("draws", "epoch"), [(0, 0), (-3, 0), (5, -1)])
def test_impossible_epochs_are_refused(draws: int, epoch: int) -> None:
    with pytest.raises(ValueError, match="at least 1 and 0 are needed"):
        EpochOrder(np.ones(5), 0, epoch, draws)


@pytest.mark.parametrize("make", [lambda: EpochOrder(None, 0, 0), lambda: EndlessOrder(None, 0)])
def test_an_order_of_nothing_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match="weights or their cumulative table"):
        make()  # type: ignore[operator]


def test_a_thousand_million_samples_are_undone_one_by_one() -> None:
    """The epoch's permutation at n = 10^9 is checked by its inverse: no array of that length is ever made."""
    n = 10**9
    permutation = Permutation(n, 77)
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.integers(0, n, 5000), [0, 1, n // 2, n - 2, n - 1]])
    y = permutation.forward(x)
    assert np.array_equal(permutation.inverse(y), x) and y.min() >= 0 and y.max() < n
    assert len(np.unique(y)) == len(np.unique(x))


def test_offsets_of_far_epochs_are_as_spread_as_those_of_near_ones() -> None:
    """Golden-ratio steps: any thousand consecutive offsets leave no gap larger than 3 in 1000 on the circle."""
    for first in (0, 10**6, 10**12):
        offsets = np.sort([EpochOrder(None, 9, first + e, cumulative=np.ones(1)).offset for e in range(1000)])
        gaps = np.diff(np.concatenate([offsets, offsets[:1] + 1]))
        assert gaps.max() < 0.003 and offsets.min() >= 0 and offsets.max() < 1


def test_the_stream_forgets_old_epochs_and_gives_them_again() -> None:
    stream = EndlessOrder(np.ones(6), 2)
    first = stream.at(np.arange(6))
    stream.at(np.arange(6, 6 * 40))
    assert len(stream._epochs) <= 9, "orders of past epochs pile up"
    assert np.array_equal(stream.at(np.arange(6)), first)
