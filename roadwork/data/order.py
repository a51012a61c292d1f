"""The order of samples as a function of (weights, seed, position): nothing to store, nothing to replay.

An epoch is systematic resampling (Kitagawa 1996, J. Comput. Graph. Stat. 5(1), appendix) read in a shuffled order:
draw k of m lands on the sample whose stretch of the cumulative weights holds (k + u) / m of the total, and position p
reads draw `permutation(p)`. Every sample is thus drawn within 1 of its expected number of times per epoch; u moves by
the golden ratio from epoch to epoch, so that rounding evens out over epochs as fast as it can.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from roadwork.errors import UserError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 times the fractional part of the golden ratio."""
_CHUNK = 1 << 20


def splitmix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): a keyed bijection of 64-bit words that mixes every bit."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
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

    def forward(self, x: Ints) -> Ints:
        """int64 [...] in 0..n-1 -> int64 [...] in 0..n-1."""
        return self._walk(x, self._encipher)

    def inverse(self, y: Ints) -> Ints:
        """The x with forward(x) = y."""
        return self._walk(y, self._decipher)

    def _walk(self, x: Ints, step: object) -> Ints:
        y = step(x)  # type: ignore[operator]
        outside = np.flatnonzero(y >= self.n)
        while outside.size:
            y[outside] = step(y[outside])  # type: ignore[operator]
            outside = outside[y[outside] >= self.n]
        return y

    def _encipher(self, x: Ints) -> Ints:
        left, right = np.divmod(x.astype(np.uint64), np.uint64(self.b))
        for r in range(0, ROUNDS, 2):
            left = _add(left, _hash(right, self.keys[r], self.a), self.a)
            right = _add(right, _hash(left, self.keys[r + 1], self.b), self.b)
        return (left * np.uint64(self.b) + right).astype(np.int64)

    def _decipher(self, y: Ints) -> Ints:
        left, right = np.divmod(y.astype(np.uint64), np.uint64(self.b))
        for r in range(ROUNDS - 2, -1, -2):
            right = _add(right, np.uint64(self.b) - _hash(left, self.keys[r + 1], self.b), self.b)
            left = _add(left, np.uint64(self.a) - _hash(right, self.keys[r], self.a), self.a)
        return (left * np.uint64(self.b) + right).astype(np.int64)


def _hash(x: Words, key: np.uint64, modulus: int) -> Words:
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
    return np.minimum(total, total - np.uint64(modulus))


def cumulative_table(weights: npt.ArrayLike, out: Floats | None = None) -> Floats:
    """Running sums of the weights, float64 [n]; refuses what cannot be drawn from, naming the first such sample.

    Weights are looked at in pieces, so that 10^8 of them need no memory beyond themselves and the table.
    """
    values = np.asarray(weights)
    if values.ndim != 1 or values.size == 0:
        raise UserError(
            f"weights have shape {values.shape}; one non-negative number per sample (at least one) is needed"
        )
    for first in range(0, values.size, _CHUNK):
        piece = values[first : first + _CHUNK]
        bad = ~(np.isfinite(piece) & (piece >= 0))
        if bad.any():
            at = int(np.argmax(bad))
            raise UserError(
                f"the weight of sample {first + at} is {piece[at]}; weights must be finite and not negative: "
                f"mend it and run `python -m shards.reweight` again"
            )
    table = np.cumsum(values, dtype=np.float64, out=out)
    if not table[-1] > 0 or not np.isfinite(table[-1]):
        raise UserError(f"the weights of {values.size} samples sum to {table[-1]}; a positive, finite sum is needed")
    return table


class EpochOrder:
    """Which sample each position of one epoch reads.

    Args:
        weights: non-negative float [n], at least one positive; samples of weight 0 are never drawn.
        seed, epoch: choose the permutation and the offset.
        num_draws: positions of the epoch; default n.
        cumulative: `cumulative_table(weights)` made before (for example memory-mapped); `weights` is not read then.
    """

    def __init__(
        self,
        weights: npt.ArrayLike | None,
        seed: int,
        epoch: int,
        num_draws: int | None = None,
        *,
        cumulative: Floats | None = None,
    ) -> None:
        if cumulative is None:
            if weights is None:
                raise ValueError("an order needs weights or their cumulative table")
            cumulative = cumulative_table(weights)
        self.cumulative = cumulative
        self.num_draws = len(cumulative) if num_draws is None else int(num_draws)
        if self.num_draws < 1 or epoch < 0:
            raise ValueError(f"num_draws is {self.num_draws}, epoch {epoch}; at least 1 and 0 are needed")
        root = splitmix64(seed & _MASK)
        self.permutation = Permutation(self.num_draws, splitmix64(root ^ epoch))
        # Whole words, so that the offset of epoch 10^6 is as exact as that of epoch 0.
        self.offset = ((splitmix64(root) + epoch * _GOLDEN & _MASK) >> 11) * 2.0**-53
        total = float(cumulative[-1])
        self._spacing = total / self.num_draws
        # (k + u) * spacing may round up to the total: that draw belongs to the last sample with any weight.
        self._last = int(np.searchsorted(cumulative, total, side="left"))

    def __len__(self) -> int:
        return self.num_draws

    def at(self, positions: npt.ArrayLike) -> Ints:
        """Sample indices int64 [...] of positions int64 [...] in 0..num_draws-1; IndexError outside."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.num_draws):
            raise IndexError(f"positions {wanted.min()}..{wanted.max()} leave the epoch of {self.num_draws} draws")
        draws = self.permutation.forward(wanted.reshape(-1))
        # side="right" finds the first sum beyond the point: a sample of weight 0 repeats its predecessor's sum.
        found = np.searchsorted(self.cumulative, (draws + self.offset) * self._spacing, side="right")
        return np.minimum(found, self._last).astype(np.int64).reshape(wanted.shape)


class EndlessOrder:
    """The stream over all epochs: global position p is position p mod n of epoch p div n (n = number of samples)."""

    def __init__(self, weights: npt.ArrayLike | None, seed: int, *, cumulative: Floats | None = None) -> None:
        if cumulative is None:
            if weights is None:
                raise ValueError("an order needs weights or their cumulative table")
            cumulative = cumulative_table(weights)
        self.cumulative, self.seed = cumulative, seed
        self._epochs: dict[int, EpochOrder] = {}

    def __len__(self) -> int:
        """Draws per epoch."""
        return len(self.cumulative)

    def epoch_of(self, positions: npt.ArrayLike) -> Ints:
        """Epoch of each global position, int64 [...]."""
        return np.asarray(positions, dtype=np.int64) // len(self)

    def at(self, global_positions: npt.ArrayLike) -> Ints:
        """Sample indices int64 [...] of global positions int64 [...] >= 0."""
        wanted = np.asarray(global_positions, dtype=np.int64)
        epochs, positions = np.divmod(wanted, len(self))
        samples = np.empty_like(wanted)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            samples[here] = self._epoch(epoch).at(positions[here])
        return samples

    def _epoch(self, epoch: int) -> EpochOrder:
        order = self._epochs.get(epoch)
        if order is None:
            if len(self._epochs) > 8:
                self._epochs.clear()
            order = self._epochs[epoch] = EpochOrder(None, self.seed, epoch, cumulative=self.cumulative)
        return order
