import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data import table
from roadwork.data.index import ShardIndex
from roadwork.data.order import EndlessOrder, EpochOrder, Permutation, cumulative_table
from roadwork.data.table import mapped_table, open_order
from roadwork.errors import UserError
from tests.data.sheets import build

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=300).filter(lambda w: sum(w) > 0)
SEEDS = st.integers(-(2**63), 2**64 - 1)


def test_a_bijection_for_every_size_to_two_thousand() -> None:
    for n in range(1, 2001):
        assert (np.sort(Permutation(n, n * 31).forward(np.arange(n))) == np.arange(n)).all()


@pytest.mark.parametrize("n", [2**k + d for k in range(11, 17) for d in (-1, 0, 1)] + [100_000])
def test_a_bijection_around_powers_of_two(n: int) -> None:
    assert (np.sort(Permutation(n, 7).forward(np.arange(n))) == np.arange(n)).all()


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.integers(100_000, 10**7), st.just(10**9), st.just(2**40)), SEEDS, st.randoms())
def test_the_inverse_undoes_it_at_any_size(n: int, key: int, random: object) -> None:
    x = np.random.default_rng(0).integers(0, n, 2000)
    x[:2] = 0, n - 1
    permutation = Permutation(n, key)
    y = permutation.forward(x)
    assert (y >= 0).all() and (y < n).all()
    assert (permutation.inverse(y) == x).all()


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, SEEDS, st.integers(0, 10**6), st.integers(1, 900))
def test_counts_are_within_one_of_their_expectation(weights: list[float], seed: int, epoch: int, draws: int) -> None:
    count = np.bincount(EpochOrder(weights, seed, epoch, draws).at(np.arange(draws)), minlength=len(weights))
    expected = np.asarray(weights) / sum(weights) * draws
    assert count.sum() == draws
    assert np.abs(count - expected).max() < 1 + 1e-9
    assert not count[np.asarray(weights) == 0].any()


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, SEEDS, st.integers(0, 10**6))
def test_ten_epochs_are_within_two(weights: list[float], seed: int, first: int) -> None:
    n = len(weights)
    drawn = EndlessOrder(weights, seed).at(first * n + np.arange(10 * n))
    expected = 10 * n * np.asarray(weights) / sum(weights)
    assert np.abs(np.bincount(drawn, minlength=n) - expected).max() < 2


def test_equal_weights_draw_each_sample_once() -> None:
    for n in (1, 2, 3, 1000):
        assert sorted(EpochOrder(np.ones(n), 3, 4).at(np.arange(n)).tolist()) == list(range(n))


def test_the_order_is_shuffled_anew_in_every_epoch_and_for_every_seed() -> None:
    n = 20_000
    orders = [EpochOrder(np.ones(n), s, e).at(np.arange(n)) for s, e in ((0, 0), (0, 1), (1, 0), (2, 5))]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.03
        assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
        for b in orders[:i]:
            assert (a == b).mean() < 0.001
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_golden_values() -> None:
    """A change here changes every run's data order: a deliberate act that must be told in the release notes."""
    weights = [5, 2.5, 0, 1, 0.3, 1, 1, 2.5]
    assert EpochOrder(weights, 0, 0).at(range(8)).tolist() == [7, 1, 3, 0, 5, 0, 7, 0]
    assert EpochOrder(weights, 0, 1).at(range(8)).tolist() == [7, 1, 0, 6, 0, 0, 1, 4]
    assert EpochOrder(weights, 7, 0).at(range(8)).tolist() == [1, 0, 5, 7, 7, 0, 0, 3]
    stream = EndlessOrder(np.arange(1, 1001) / 7.0, 20261123)
    assert stream.at([0, 1, 2, 999, 1000, 123456789]).tolist() == [907, 215, 994, 781, 179, 941]
    assert Permutation(10**9, 42).forward(np.asarray([0, 1, 2, 10**9 - 1])).tolist() == [
        311095315,
        275177329,
        563778239,
        369344213,
    ]


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, SEEDS, st.integers(0, 10**9), st.integers(1, 400))
def test_any_slicing_reads_the_same_stream(weights: list[float], seed: int, start: int, length: int) -> None:
    stream = EndlessOrder(weights, seed)
    whole = stream.at(np.arange(start, start + length))
    one_by_one = [int(EndlessOrder(weights, seed).at(p)) for p in range(start, start + min(length, 20))]
    assert whole[:20].tolist() == one_by_one
    strided = np.empty_like(whole)
    for rank in range(3):
        strided[rank::3] = stream.at(np.arange(start, start + length)[rank::3])
    assert (strided == whole).all()


def test_the_stream_is_its_epochs_end_to_end() -> None:
    weights = np.asarray([1.0, 3.0, 0.0, 2.0, 2.0])
    stream = EndlessOrder(weights, 9)
    positions = np.arange(23)  # 23 mod 5 != 0, and more than an epoch at once
    expected = np.concatenate([EpochOrder(weights, 9, e).at(np.arange(5)) for e in range(5)])[:23]
    assert (stream.at(positions) == expected).all()
    assert (stream.epoch_of(positions) == positions // 5).all()
    assert (EndlessOrder([0.3], 1).at(np.arange(50)) == 0).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5, 2.0], "the weight of sample 1 is -0.5"),
        ([1.0, 2.0, float("nan")], "the weight of sample 2 is nan"),
        ([float("inf"), 1.0], "the weight of sample 0 is inf"),
        ([0.0, 0.0], "the weights of 2 samples sum to 0"),
        ([], "at least one"),
        ([[1.0]], r"shape \(1, 1\)"),
        ([1e308, 1e308], "sum to inf"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_weights_that_cannot_be_drawn_are_refused_by_name(weights: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EpochOrder(weights, 0, 0)


def test_positions_outside_the_epoch_are_refused() -> None:
    for position in (-1, 4):
        with pytest.raises(IndexError, match="leave the epoch of 4 draws"):
            EpochOrder(np.ones(4), 0, 0).at([position])


def test_the_last_sample_with_weight_takes_a_draw_that_rounds_up() -> None:
    weights = np.asarray([0.1] * 10 + [0.0])
    order = EpochOrder(weights, 0, 0, 10)
    order.offset = 1 - 2.0**-53
    order._spacing = np.nextafter(order._spacing, 1)
    assert order.at(np.arange(10)).max() == 9


def test_a_draw_on_an_edge_belongs_to_the_next_sample_with_weight() -> None:
    order = EpochOrder([0.0, 1.0, 0.0, 1.0, 1.0], 0, 0, 3)
    order.offset = 0.0
    assert sorted(order.at(np.arange(3)).tolist()) == [1, 3, 4]


def test_a_mapped_table_gives_the_same_order(tmp_path) -> None:
    weights = np.random.default_rng(0).choice([5, 2.5, 1, 0.3, 0], 5000)
    mapped = mapped_table(tmp_path, "train", "a1", weights)
    assert isinstance(mapped, np.memmap) and (mapped == cumulative_table(weights)).all()
    positions = np.arange(12_345)
    assert (EndlessOrder(None, 3, cumulative=mapped).at(positions) == EndlessOrder(weights, 3).at(positions)).all()
    made = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    mapped_table(tmp_path, "train", "a1", weights)
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == made
    assert (mapped_table(tmp_path, "train", "b2", weights[::-1]) == cumulative_table(weights[::-1])).all()


def test_a_mapped_table_outlives_other_weights_while_runs_may_use_it(tmp_path: Path) -> None:
    """Removed under a run of another machine, on a network file system, it would kill that run."""
    weights = np.ones(100)
    mapped_table(tmp_path, "train", "a1", weights)
    mapped_table(tmp_path, "train", "b2", weights)
    opened_last = time.time() - (table.KEPT_DAYS + 1) * 86400
    for path in tmp_path.glob("*.npy"):
        os.utime(path, (opened_last, opened_last))
    mapped_table(tmp_path, "train", "b2", weights)
    mapped_table(tmp_path, "train", "c3", weights)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == [
        "train.cumulative-b2.npy",
        "train.cumulative-c3.npy",
    ]


def test_a_table_is_there_where_its_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    mapped = mapped_table(tmp_path / "file" / "in", "train", "a1", np.ones(7))
    assert isinstance(mapped, np.memmap) and (mapped == np.arange(1.0, 8.0)).all()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert (mapped_table(tmp_path / "file" / "in", "train", "a1", np.ones(7)) == np.arange(1.0, 8.0)).all()


def test_a_table_that_another_process_makes_is_waited_for_and_never_replaced(tmp_path: Path) -> None:
    """Others have mapped it then; on a network file system they would die of it."""
    path = tmp_path / "new" / "train.cumulative-a1.npy"
    path.parent.mkdir()
    code = f"""
import numpy as np
from roadwork.data.table import mapped_table
print("asked", flush=True)
print(mapped_table({str(path.parent)!r}, "train", "a1", np.ones(3))[-1])
"""
    with open(path.with_name("train.cumulative.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "asked\n"
        time.sleep(0.5)
        assert not path.exists()
        np.save(path, np.array([1.0, 2.0, 42.0]))
    assert other.communicate(timeout=60)[0] == "42.0\n"


def test_a_split_opens_its_own_order(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.open(build(tmp_path / "shards"), "train")
    positions = np.arange(100)
    expected = EndlessOrder(index.gps_weight, 2).at(positions)
    assert (open_order(index, 2).at(positions) == expected).all()
    assert sorted(open_order(index, 2, weighted=False).at(np.arange(21)).tolist()) == list(range(21))
    monkeypatch.setattr(table, "MAP_FROM", 10)
    mapped = open_order(index, 2)
    assert isinstance(mapped.cumulative, np.memmap) and (mapped.at(positions) == expected).all()


def test_a_hundred_million_weights_fit_into_1_7_gib() -> None:
    code = """
import re, numpy as np
from roadwork.data.order import EndlessOrder
n = 10**8
weights = np.empty(n)
for first in range(0, n, 10**6):
    weights[first:first + 10**6] = np.tile([5.0, 2.5, 1.0, 0.3], 250_000)
order = EndlessOrder(weights, 0)
samples = order.at(np.asarray([0, n - 1, n, 10 * n + 5]))
assert ((samples >= 0) & (samples < n)).all()
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""  # not ru_maxrss: that begins at the size of the process which starts this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 2**20 < 1.7
