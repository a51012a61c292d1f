"""The order of samples as a function of (weights, seed, position): nothing to store, nothing to replay.

An epoch is systematic resampling (Kitagawa 1996, J. Comput. Graph. Stat. 5(1), appendix) read in a shuffled order:
draw k of m lands on the sample whose stretch of the cumulative weights holds (k + u) / m of the total, and position p
reads draw `permutation(p)`. Every sample is thus drawn within 1 of its expected number of times per epoch; u moves by
the golden ratio from epoch to epoch, so that rounding evens out over epochs as fast as it can. Which permutation is taken
changes the order of the draws, never the draws: with `Windows`, reads stay near each other and the counts are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from roadwork.data.permutation import GOLDEN, MASK, Permutation, ShardPermutation, splitmix64
from roadwork.errors import UserError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_CHUNK = 1 << 20
_BLOCK = 1 << 12
"""Weights that are summed one after the other; over more of them rounding would add up to whole draws."""


def cumulative_table(weights: npt.ArrayLike, out: Floats | None = None) -> Floats:
    """Running sums of the weights, float64 [n]; UserError for what cannot be drawn from, naming the first such sample.

    Weights [n] are looked at in pieces, so that 10^8 of them need no memory beyond themselves and the table.
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
    table = _running_sums(values, np.empty(values.size) if out is None else out)
    if not table[-1] > 0 or not np.isfinite(table[-1]):
        raise UserError(f"the weights of {values.size} samples sum to {table[-1]}; a positive, finite sum is needed")
    return table


def _running_sums(values: npt.NDArray[Any], table: Floats) -> Floats:
    """Running sums of `values` [n] in `table` [n]: a few ulp from the true ones for any n, where `np.cumsum` drifts.

    Blocks are summed by themselves, and what lies before each is carried by compensated summation (Kahan 1965).
    """
    before, lost = 0.0, 0.0
    for first in range(0, values.size, _BLOCK):
        part = table[first : first + _BLOCK]
        np.cumsum(values[first : first + _BLOCK], dtype=np.float64, out=part)
        block = float(part[-1]) - lost
        part += before
        after = before + block
        before, lost = after, (after - before) - block
    return np.maximum.accumulate(table, out=table)  # a block may begin an ulp below the end of the one before


@dataclass(frozen=True)
class Windows:
    """Keep reads near each other: each window of `size` positions reads few shards.

    edges: int64 [S + 1], 0 to n: first sample of each shard. size: positions per window, at least 1.
    """

    edges: Ints
    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or len(self.edges) < 2 or (np.diff(self.edges) < 0).any() or self.edges[0] != 0:
            raise ValueError(f"windows of {self.size} over edges {self.edges[:3]}...: a size from 1, edges from 0 up")


class EpochOrder:
    """Which sample each position of one epoch reads.

    Args:
        weights: non-negative float [n], at least one positive; samples of weight 0 are never drawn.
        seed, epoch: choose the permutation and the offset.
        num_draws: positions of the epoch; default n.
        cumulative: `cumulative_table(weights)` made before (for example memory-mapped); `weights` is not read then.
        windows: keep the reads of neighbouring positions in few shards; without, any position may read anywhere.
    """

    def __init__(
        self,
        weights: npt.ArrayLike | None,
        seed: int,
        epoch: int,
        num_draws: int | None = None,
        *,
        cumulative: Floats | None = None,
        windows: Windows | None = None,
    ) -> None:
        if cumulative is None:
            if weights is None:
                raise ValueError("an order needs weights or their cumulative table")
            cumulative = cumulative_table(weights)
        self.cumulative = cumulative
        self.num_draws = len(cumulative) if num_draws is None else int(num_draws)
        if self.num_draws < 1 or epoch < 0:
            raise ValueError(f"num_draws is {self.num_draws}, epoch {epoch}; at least 1 and 0 are needed")
        root = splitmix64(seed & MASK)
        # Whole words, so that the offset of epoch 10^6 is as exact as that of epoch 0.
        self.offset = ((splitmix64(root) + epoch * GOLDEN & MASK) >> 11) * 2.0**-53
        total = float(cumulative[-1])
        self._spacing = total / self.num_draws
        # (k + u) * spacing may round up to the total: that draw belongs to the last sample with any weight.
        self._last = int(np.searchsorted(cumulative, total, side="left"))
        key = splitmix64(root ^ epoch)
        self.permutation: Permutation | ShardPermutation
        if windows is None:
            self.permutation = Permutation(self.num_draws, key)
        else:
            self.permutation = ShardPermutation(self._bounds(windows.edges), windows.size, key)

    def __len__(self) -> int:
        return self.num_draws

    def at(self, positions: npt.ArrayLike) -> Ints:
        """Sample indices int64 [...] of positions int64 [...] in 0..num_draws-1; IndexError outside."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.num_draws):
            raise IndexError(f"positions {wanted.min()}..{wanted.max()} leave the epoch of {self.num_draws} draws")
        return self._sample(self.permutation.forward(wanted.reshape(-1))).reshape(wanted.shape)

    def _sample(self, draws: Ints) -> Ints:
        """The sample that each draw lands on; never falls as the draw's number rises."""
        # side="right" finds the first sum beyond the point: a sample of weight 0 repeats its predecessor's sum.
        found = np.searchsorted(self.cumulative, (draws + self.offset) * self._spacing, side="right")
        return np.minimum(found, self._last).astype(np.int64)

    def _bounds(self, edges: Ints) -> Ints:
        """First draw of each shard, int64 [S + 1]: the number of draws that land before its first sample."""
        if edges[-1] != len(self.cumulative):
            raise ValueError(f"the windows' edges end at {edges[-1]}, the order has {len(self.cumulative)} samples")
        before = np.where(edges > 0, self.cumulative[np.maximum(edges, 1) - 1], 0.0)
        guess = np.ceil(before / self._spacing - self.offset).astype(np.int64)
        bounds = np.clip(guess, 0, self.num_draws)
        # Rounding may put the guess one draw beside the truth, which is what `_sample` says.
        bounds -= (bounds > 0) & (self._sample(bounds - 1) >= edges)
        bounds += (bounds < self.num_draws) & (self._sample(bounds) < edges)
        bounds[-1] = self.num_draws
        return bounds


class EndlessOrder:
    """The stream over all epochs: global position p is position p mod n of epoch p div n (n = number of samples)."""

    def __init__(
        self,
        weights: npt.ArrayLike | None,
        seed: int,
        *,
        cumulative: Floats | None = None,
        windows: Windows | None = None,
    ) -> None:
        if cumulative is None:
            if weights is None:
                raise ValueError("an order needs weights or their cumulative table")
            cumulative = cumulative_table(weights)
        self.cumulative, self.seed, self.windows = cumulative, seed, windows
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
            order = EpochOrder(None, self.seed, epoch, cumulative=self.cumulative, windows=self.windows)
            self._epochs[epoch] = order
        return order
