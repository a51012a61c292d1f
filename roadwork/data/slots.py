"""One batch's pixels as they lie in memory that the training process shares with its loader processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from roadwork.data.decode import NUM_CLASSES

TEXT_DIM = 384
_PAGE = 4096

TASK = np.dtype(
    [
        ("row", "<i8"), ("shard", "<i8"), ("num_views", "<i8"), ("crc", "<i8"),
        ("views_offset", "<i8"), ("views_size", "<i8"),
        ("masks_offset", "<i8"), ("masks_size", "<i8"),
        ("meta_offset", "<i8"), ("meta_size", "<i8"),
    ]
)  # fmt: skip
"""Where one photo lies in the shards and which row of the batch it fills; num_views 0: leave the row empty."""


@dataclass(frozen=True)
class SlotLayout:
    """Where a batch's arrays lie within one slot. A slot is as large as the largest batch; the views of a batch are
    packed for the batch's own number of views."""

    batch: int
    max_views: int
    view_size: int
    mask_size: int
    masks: bool
    text: bool

    @property
    def _sizes(self) -> tuple[int, int, int]:
        photos = self.batch * self.max_views
        views = photos * self.view_size**2 * 3
        masks = photos * NUM_CLASSES * self.mask_size**2 if self.masks else 0
        text = self.batch * TEXT_DIM * 4 if self.text else 0
        return _pages(views), _pages(masks), _pages(text)

    @property
    def slot_bytes(self) -> int:
        return sum(self._sizes)

    def arrays(self, slot: npt.NDArray[np.uint8], views: int) -> dict[str, npt.NDArray[Any]]:
        """`views` uint8 [B, V, S, S, 3]; where wanted, `masks` uint8 [B, V, 6, s, s] and `text` float32 [B, 384]."""
        views_at, masks_at = self._sizes[0], self._sizes[0] + self._sizes[1]
        shape = (self.batch, views, self.view_size, self.view_size, 3)
        found: dict[str, npt.NDArray[Any]] = {"views": slot[: int(np.prod(shape))].reshape(shape)}
        if self.masks:
            shape = (self.batch, views, NUM_CLASSES, self.mask_size, self.mask_size)
            found["masks"] = slot[views_at : views_at + int(np.prod(shape))].reshape(shape)
        if self.text:
            text = slot[masks_at : masks_at + self.batch * TEXT_DIM * 4]
            found["text"] = text.view(np.float32).reshape(self.batch, TEXT_DIM)
        return found


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
