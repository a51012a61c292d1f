"""Keyed permutations of 0..n-1, computed element by element: of everything at once, or window by window over shards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 8
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 times the fractional part of the golden ratio."""


def splitmix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): a keyed bijection of 64-bit words that mixes every bit."""
    x = (x + GOLDEN) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


class Permutation:
    """A keyed pseudo-random bijection of 0..n-1, computed element by element.

    A Feistel network on Z_a x Z_b with a * b just above n (Black and Rogaway 2002, section 5); the few results outside
    0..n-1 are fed in again until they fall inside (cycle walking), which keeps the map a bijection.
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = int(n)
        self.a = next(a for a in range(int(self.n**0.5), self.n + 2) if a * a >= self.n)
        self.b = -(-self.n // self.a)
        self.keys = [np.uint64(splitmix64(key + r)) for r in range(ROUNDS)]

    def forward(self, x: Ints, tweak: Words | None = None) -> Ints:
        """int64 [N] in 0..n-1 -> int64 [N] in 0..n-1. `tweak` [N]: each word chooses another permutation."""
        return self._walk(x, tweak, self._encipher)

    def inverse(self, y: Ints, tweak: Words | None = None) -> Ints:
        """The x, int64 [N], with forward(x, tweak) = y; y and `tweak` [N]."""
        return self._walk(y, tweak, self._decipher)

    def _walk(self, x: Ints, tweak: Words | None, step: Callable[[Ints, Words], Ints]) -> Ints:
        words = np.zeros(1, np.uint64) if tweak is None else tweak
        y = step(x, words)
        outside = np.flatnonzero(y >= self.n)
        while outside.size:
            y[outside] = step(y[outside], words if tweak is None else words[outside])
            outside = outside[y[outside] >= self.n]
        return y

    def _encipher(self, x: Ints, tweak: Words) -> Ints:
        left, right = np.divmod(x.astype(np.uint64), np.uint64(self.b))
        for r in range(0, ROUNDS, 2):
            left = _add(left, _hash(right, self.keys[r] + tweak, self.a), self.a)
            right = _add(right, _hash(left, self.keys[r + 1] + tweak, self.b), self.b)
        return (left * np.uint64(self.b) + right).astype(np.int64)

    def _decipher(self, y: Ints, tweak: Words) -> Ints:
        left, right = np.divmod(y.astype(np.uint64), np.uint64(self.b))
        for r in range(ROUNDS - 2, -1, -2):
            right = _add(right, np.uint64(self.b) - _hash(left, self.keys[r + 1] + tweak, self.b), self.b)
            left = _add(left, np.uint64(self.a) - _hash(right, self.keys[r] + tweak, self.a), self.a)
        return (left * np.uint64(self.b) + right).astype(np.int64)


class ShardPermutation:
    """A keyed bijection of 0..n-1 that reads shard after shard, and shuffles within windows of several shards.

    Numbers b[s]..b[s+1]-1 are the draws of shard s. Shards are laid end to end in a shuffled order; that row is cut into
    windows of `window` places (the last one is shorter), and the places of each window are shuffled among themselves.
    So the draws of a shard lie in consecutive windows, and each window reads one stretch of the row.

    Args:
        bounds: int64 [S + 1], from 0 to n, never falling: first draw of each shard.
        window: places per window, at least 1.
        key: chooses the shuffles.
    """

    def __init__(self, bounds: Ints, window: int, key: int) -> None:
        self.n, self.window = int(bounds[-1]), int(window)
        self.bounds, shards = bounds, len(bounds) - 1
        self.row = Permutation(shards, splitmix64(key ^ 1)).forward(np.arange(shards))
        """Shards in the order in which they are read."""
        self.starts = np.concatenate([[0], np.cumsum(np.diff(bounds)[self.row])])
        self.place_of = np.empty(shards, np.int64)
        self.place_of[self.row] = np.arange(shards)
        self._whole = Permutation(self.window, key)
        self._rest = Permutation(max(self.n % self.window, 1), key)
        self._tweak = np.uint64(splitmix64(key ^ 2))

    def forward(self, x: Ints) -> Ints:
        """int64 [N] in 0..n-1 -> int64 [N] in 0..n-1."""
        place = self._within(x, back=False)
        at = np.searchsorted(self.starts, place, side="right") - 1
        number: Ints = self.bounds[self.row[at]] + place - self.starts[at]
        return number

    def inverse(self, y: Ints) -> Ints:
        """The x with forward(x) = y."""
        shard = np.searchsorted(self.bounds, y, side="right") - 1
        return self._within(self.starts[self.place_of[shard]] + y - self.bounds[shard], back=True)

    def _within(self, x: Ints, back: bool) -> Ints:
        """Shuffle the places of each window, or undo it."""
        number, inside = np.divmod(x, self.window)
        tweak = (number.astype(np.uint64) + self._tweak) * np.uint64(GOLDEN)
        last = number == self.n // self.window
        for part, permutation in ((last, self._rest), (~last, self._whole)):
            step = permutation.inverse if back else permutation.forward
            inside[part] = step(inside[part], tweak[part])
        return number * self.window + inside


def _hash(x: Words, key: Words, modulus: int) -> Words:
    """A word of x and key in 0..modulus-1 (multiply and shift instead of a division)."""
    h = (x + key) * np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0x94D049BB133111EB)
    h >>= np.uint64(32)
    h *= np.uint64(modulus)
    h >>= np.uint64(32)
    return h


def _add(x: Words, y: Words, modulus: int) -> Words:
    """x + y mod modulus, for x < modulus and y <= modulus."""
    total = x + y
    rest: Words = np.minimum(total, total - np.uint64(modulus))  # the smaller: below 0 it wraps around
    return rest
