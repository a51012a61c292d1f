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
        kept = np.array([keep_count(int(v), keep_ratio) for v in range(int(index.num_views.max()) + 1)])
        self._views = np.asarray(index.num_views)
        self._kept: NDArray[np.int64] = kept[self._views]
        self._label = np.asarray(index.label) >= 0
        self._weather = np.asarray(index.weather) >= 0
        self._classes = np.asarray(index.masks_valid).sum(1)
        self._all_classes: NDArray[np.bool_] = self._classes == np.asarray(index.masks_valid).shape[1]

    def samples(self, step: int) -> NDArray[np.int64]:
        """Rows of the index, int64 [global batch], that optimizer step `step` draws (those past the end left out)."""
        first = step * self.global_batch
        last = min(first + self.global_batch, self.end_position)
        return self.order.at(np.arange(first, max(first, last)))

    def views(self, step: int) -> tuple[int, int]:
        """Views of all photos of an optimizer step, and how many of them pruning keeps."""
        rows = self.samples(step)
        return int(self._views[rows].sum()), int(self._kept[rows].sum())

    def of(self, step: int) -> Counts:
        """The counts of one optimizer step."""
        rows = self.samples(step)
        kept = self._kept[rows]
        return Counts(
            label=float(self._label[rows].sum()),
            weather=float(self._weather[rows].sum()),
            views=float((kept >= 2).sum()),
            segmentation=float((kept * self._classes[rows]).sum()),
            view_labels=float((kept * self._all_classes[rows]).sum()),
            parts=float(self.parts),
        )
