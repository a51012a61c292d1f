"""What a loader yields: one micro-batch of photos with everything that is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from roadwork.data.decode import NUM_CLASSES
from roadwork.data.index import ShardIndex
from roadwork.data.pool import Lease

IGNORE = -100
"""Target of an unknown label or weather."""


@dataclass(eq=False)
class Batch:
    """B photos padded to V views, the largest number among them.

    A photo of weight 0 (past the end of the run, or unreadable) has black pixels, no targets and valid shapes: at least
    its first view counts as present, so that a masked softmax over views stays finite.
    """

    views: torch.Tensor
    """uint8 [B, V, 3, S, S]; in memory [B, V, S, S, 3] (channels last), black where `view_mask` is false."""
    view_mask: torch.Tensor
    """bool [B, V]: true for real views."""
    boxes: torch.Tensor
    """float32 [B, V, 4]: view boxes as fractions of the photo (x0, y0, x1, y1)."""
    metadata: dict[str, torch.Tensor]
    """gps float32 [B, 2] degrees (NaN missing); weather, daytime, scene int64 [B] (-1 NULL); text float32 [B, 384]
    (NaN missing) only where it was asked for."""
    label: torch.Tensor
    """int64 [B]: 0, 1, or -100 unknown."""
    weather: torch.Tensor
    """int64 [B]: the weather as a target, -100 for NULL."""
    masks: torch.Tensor | None
    """uint8 {0, 1} [B, V, 6, s, s], or None where the split has no masks or none were asked for."""
    masks_valid: torch.Tensor
    """bool [B, 6]: classes whose masks may be learned from."""
    sample: torch.Tensor
    """int64 [B]: row of the index."""
    position: torch.Tensor
    """int64 [B]: global position in the stream; the sample itself in evaluation."""
    epoch: torch.Tensor
    """int64 [B]: epoch of the position; 0 in evaluation."""
    weight: torch.Tensor
    """float32 [B]: 1, or 0 for photos that are not there."""
    ids: list[str]
    """The photos' ids."""
    skipped: list[tuple[str, str]]
    """(id, reason) of the photos of this batch that could not be read."""
    wait_s: float
    """Seconds for which the training process waited for this batch."""
    lease: Lease | None = field(default=None, repr=False)
    faults: list[str] = field(default_factory=list)
    """What kept shards of this batch from being read, remedy included; all of its photos then weigh 0."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on a device. With `non_blocking`, the shared memory behind it stays untouched until the copy
        is done."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        moved: dict[str, Any] = {
            name: move(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        moved["metadata"] = {name: move(value) for name, value in self.metadata.items()}
        if self.lease is not None and non_blocking and moved["views"].is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(moved["views"].device))
            self.lease.events.append(event)
        on_host = moved["views"].device == self.views.device
        return replace(self, **moved, lease=self.lease if on_host else None)


def assemble(
    index: ShardIndex,
    rows: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    epochs: npt.NDArray[np.int64],
    there: npt.NDArray[np.bool_],
    pixels: dict[str, torch.Tensor],
    failed: list[tuple[int, str]],
) -> Batch:
    """Put a batch together from its decoded pixels and the index's columns.

    Args:
        rows, positions, epochs: int64 [B]; there: bool [B], false past the end of the run.
        pixels: views uint8 [B, V, S, S, 3], and masks, text where wanted.
        failed: (row of the batch, reason) of unreadable photos.
    """
    ids, bad = index.names(rows), [row for row, _ in failed]
    alive = there.copy()
    alive[bad] = False
    views = pixels["views"]
    present = np.arange(views.shape[1]) < np.where(there, index.num_views[rows], 1)[:, None]
    boxes = index.padded_boxes(rows)[:, : views.shape[1]] * present[..., None]
    weather = index.weather[rows].astype(np.int64)
    label = index.label[rows].astype(np.int64)
    metadata = {
        "gps": np.stack([index.latitude[rows], index.longitude[rows]], axis=1).astype(np.float32),
        "weather": weather,
        "daytime": index.daytime[rows].astype(np.int64),
        "scene": index.scene[rows].astype(np.int64),
    }
    tensors = {name: torch.from_numpy(column) for name, column in metadata.items()}
    if "text" in pixels:
        tensors["text"] = pixels["text"]
    return Batch(
        views=views.permute(0, 1, 4, 2, 3),
        view_mask=torch.from_numpy(present),
        boxes=torch.from_numpy(boxes),
        metadata=tensors,
        label=torch.from_numpy(np.where(alive & (label >= 0), label, IGNORE)),
        weather=torch.from_numpy(np.where(alive & (weather >= 0), weather, IGNORE)),
        masks=pixels.get("masks"),
        masks_valid=torch.from_numpy(index.masks_valid[rows] & alive[:, None]).view(len(rows), NUM_CLASSES),
        sample=torch.from_numpy(rows.copy()),
        position=torch.from_numpy(positions.copy()),
        epoch=torch.from_numpy(epochs.copy()),
        weight=torch.from_numpy(alive.astype(np.float32)),
        ids=ids,
        skipped=[(ids[row], reason) for row, reason in failed],
        wait_s=0.0,
    )
