"""The losses' denominators of a whole step, as the index knows them, against what the ranks' batches hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from roadwork.data.index import ShardIndex
from roadwork.data.order import EndlessOrder
from roadwork.losses import Counts
from roadwork.losses.focal import IGNORE
from roadwork.models.pruning import keep_count
from roadwork.training.counts import StepCounts

PHOTOS, BATCH, END, RATIO = 37, 12, 57, 2 / 3
"""The fifth step is cut short by the end of the run: 9 photos."""


@pytest.fixture
def index() -> ShardIndex:
    """Unknown labels, NULL weather, photos of 1 to 12 views, masks valid for none, some or all classes."""
    draw = np.random.default_rng(3)
    masks = draw.random((PHOTOS, 6)) < 0.5
    masks[::4], masks[1::4] = True, False
    made: Any = SimpleNamespace(
        label=draw.integers(-1, 2, PHOTOS).astype(np.int8),
        weather=draw.integers(-1, 8, PHOTOS).astype(np.int8),
        num_views=draw.integers(1, 13, PHOTOS).astype(np.uint8),
        masks_valid=masks,
    )
    return cast(ShardIndex, made)


def held(index: ShardIndex, rows: np.ndarray, there: np.ndarray) -> torch.Tensor:
    """What one rank counts in one micro-batch."""
    label, weather = (torch.from_numpy(np.where(v[rows] < 0, IGNORE, v[rows])) for v in (index.label, index.weather))
    kept = torch.tensor([keep_count(int(v), RATIO) for v in index.num_views[rows]])
    return Counts.local(label, weather, kept, torch.from_numpy(index.masks_valid[rows]), torch.from_numpy(there))


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (2, 3), (4, 1)])
def test_a_steps_counts_are_the_sum_over_all_ranks_and_micro_batches(index: ShardIndex, world: int, micro: int) -> None:
    order = EndlessOrder(np.random.default_rng(1).random(PHOTOS), seed=5)
    parts = BATCH // micro
    counts = StepCounts(index, order, BATCH, END, RATIO, parts)
    for step in range(-(-END // BATCH)):
        total = torch.zeros(5, dtype=torch.float64)
        for first in range(0, BATCH, micro):
            positions = step * BATCH + first + np.arange(micro)
            total += held(index, order.at(positions), (positions < END).astype(np.float32))
        assert counts.of(step) == Counts.of(total, float(parts)), f"step {step}"
    assert len(counts.samples(4)) == END - 4 * BATCH
