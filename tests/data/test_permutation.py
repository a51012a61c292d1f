"""The keyed permutations by themselves: known words of the hash, both ways of every shape, and that keys decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from roadwork.data.permutation import GOLDEN, MASK, Permutation, ShardPermutation, splitmix64

KEYS = st.integers(0, MASK)


def test_splitmix64_gives_the_published_words() -> None:
    """The first outputs of SplitMix64 from the seed 1234567, as its reference implementation prints them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state, words = 1234567, []
    for _ in published:
        words.append(splitmix64(state))
        state = state + GOLDEN & MASK
    assert words == published


@settings(max_examples=200)
@given(KEYS, st.integers(0, 63))
def test_one_bit_of_the_seed_changes_about_half_of_the_word(word: int, bit: int) -> None:
    changed = bin(splitmix64(word) ^ splitmix64(word ^ (1 << bit))).count("1")
    assert 8 <= changed <= 56


@settings(max_examples=100)
@given(st.integers(1, 500), KEYS, st.integers(0, MASK))
def test_a_tweak_chooses_another_permutation_of_the_same_numbers(n: int, key: int, tweak: int) -> None:
    x, words = np.arange(n), np.full(n, tweak, np.uint64)
    permutation = Permutation(n, key)
    y = permutation.forward(x, words)
    assert np.array_equal(np.sort(y), x)
    assert np.array_equal(permutation.inverse(y, words), x)
    assert np.array_equal(permutation.forward(x, np.zeros(n, np.uint64)), permutation.forward(x))


def test_each_element_may_have_a_tweak_of_its_own() -> None:
    permutation = Permutation(97, 5)
    x, tweaks = np.arange(97).repeat(3), np.tile(np.array([0, 1, 2**63], np.uint64), 97)
    together = permutation.forward(x, tweaks)
    for word in np.unique(tweaks):
        rows = tweaks == word
        assert np.array_equal(together[rows], permutation.forward(x[rows], tweaks[rows]))
    assert np.array_equal(permutation.inverse(together, tweaks), x)


def test_elements_are_computed_one_by_one_as_all_at_once() -> None:
    permutation = Permutation(1000, 3)
    whole = permutation.forward(np.arange(1000))
    assert [int(permutation.forward(np.array([i]))[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()
    assert permutation.forward(np.zeros(0, np.int64)).shape == (0,)


def test_over_many_keys_every_place_is_as_likely_as_every_other() -> None:
    """Where element 0 and element 5 of 12 land, and in which order, over 3,000 keys (chi-square, p > 1e-4)."""
    landed = np.array([Permutation(12, key).forward(np.array([0, 5])) for key in range(3000)])
    for column in landed.T:
        assert chisquare(np.bincount(column, minlength=12)).pvalue > 1e-4
    pairs = np.bincount(landed[:, 0] * 12 + landed[:, 1], minlength=144).reshape(12, 12)
    assert not np.diag(pairs).any()
    assert chisquare(pairs[~np.eye(12, dtype=bool)]).pvalue > 1e-4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_smallest_sets_are_permuted_in_every_possible_way(n: int) -> None:
    seen = {tuple(Permutation(n, key).forward(np.arange(n)).tolist()) for key in range(200)}
    assert len(seen) == [1, 2, 6][n - 1]


shards = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=60)
@given(shards, st.integers(1, 80), KEYS)
def test_shards_are_permuted_both_ways_whatever_their_sizes(sizes: list[int], window: int, key: int) -> None:
    """Empty shards, one shard, a window larger than everything: still a bijection, and its inverse."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    permutation = ShardPermutation(bounds, window, key)
    x = np.arange(sum(sizes))
    y = permutation.forward(x)
    assert np.array_equal(np.sort(y), x)
    assert np.array_equal(permutation.inverse(y), x)


@settings(max_examples=20)
@given(shards, st.integers(1, 80), KEYS)
def test_a_window_reads_one_stretch_of_the_row_of_shards(sizes: list[int], window: int, key: int) -> None:
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    permutation = ShardPermutation(bounds, window, key)
    n = int(bounds[-1])
    row = np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in permutation.row])
    for first in range(0, n, window):
        places = np.arange(first, min(first + window, n))
        assert sorted(permutation.forward(places)) == sorted(row[places])


def test_a_window_of_one_reads_shard_after_shard_in_order() -> None:
    bounds = np.array([0, 3, 5, 9])
    permutation = ShardPermutation(bounds, 1, 11)
    read = permutation.forward(np.arange(9)).tolist()
    stretches = [list(range(bounds[s], bounds[s + 1])) for s in permutation.row]
    assert read == [i for stretch in stretches for i in stretch]


def test_every_window_is_shuffled_in_its_own_way() -> None:
    permutation = ShardPermutation(np.array([0, 4000]), 100, 9)
    inside = permutation.forward(np.arange(4000)).reshape(40, 100) - np.arange(0, 4000, 100)[:, None]
    assert len({tuple(line) for line in inside.tolist()}) == 40
