"""Valid elements of a whole optimizer step, known from the index before any photo is read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roadwork.data.index import ShardIndex
from roadwork.data.order import EndlessOrder
from roadwork.losses import Counts
from roadwork.models.pruning import keep_count


class StepCounts:
    """The losses' denominators for any optimizer step, the same on every rank without a message.

    The order is a function and the index holds labels, NULLs and mask validity, so the counts of all ranks and
    micro-batches need no communication. A photo that turns out unreadable stays counted: its terms are missing from the sums.

    Args:
        index: the training split.
        order: its endless order.
        global_batch: photos per optimizer step.
        end_position: positions from here on are past the run's end and weigh 0.
        keep_ratio: share of views that pruning keeps.
        parts: processes times micro-batches per step.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: EndlessOrder,
        global_batch: int,
        end_position: int,
        keep_ratio: float,
        parts: int,
    ) -> None:
        self.order = order
        self.global_batch = global_batch
        self.end_position = end_position
        self.parts = parts
        self.index = index
        self._kept = np.array([keep_count(v, keep_ratio) for v in range(int(index.num_views.max()) + 1)])

    def samples(self, step: int) -> NDArray[np.int64]:
        """Rows of the index, int64 [global batch], that optimizer step `step` draws (those past the end left out)."""
        first = step * self.global_batch
        last = min(first + self.global_batch, self.end_position)
        return self.order.at(np.arange(first, max(first, last)))

    def views(self, step: int) -> tuple[int, int]:
        """Views of all photos of an optimizer step, and how many of them pruning keeps."""
        views = self.index.num_views[self.samples(step)]
        return int(views.sum()), int(self._kept[views].sum())

    def of(self, step: int) -> Counts:
        """The counts of one optimizer step."""
        rows = self.samples(step)
        kept = self._kept[self.index.num_views[rows]]
        valid = self.index.masks_valid[rows]
        return Counts(
            label=float((self.index.label[rows] >= 0).sum()),
            weather=float((self.index.weather[rows] >= 0).sum()),
            views=float((kept >= 2).sum()),
            segmentation=float((kept * valid.sum(1)).sum()),
            view_labels=float((kept * valid.all(1)).sum()),
            parts=float(self.parts),
        )
