"""Which (photo, view) slots of a padded batch are computed at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Slots:
    """A padded grid [B, V] and, where padding is skipped, the flat indices of its valid slots.

    Skipping needs the number of valid slots on the host. A mask on the CPU gives it for nothing, also when the pixels
    are on a GPU; a mask on the GPU would stall the queue, so then every slot is computed (the shapes stay constant,
    which compiled blocks want; an exported graph has no choice) and masks hide the padding later. Both give the same
    results.
    """

    batch: int
    views: int
    index: Tensor | None
    """int64 [N], ascending flat indices b * V + v of the computed slots; None: all of them."""

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Slots:
        """Slots of a bool [B, V] mask, for values on `device`."""
        batch, views = mask.shape
        if torch.compiler.is_exporting() or mask.device.type != "cpu" or cls.full(mask):
            return cls(batch, views, None)
        index = mask.flatten().nonzero().squeeze(1)
        return cls(batch, views, index.to(device, non_blocking=True))

    @staticmethod
    def full(mask: Tensor) -> bool:
        """Whether the host knows, without waiting, that no slot is padding."""
        return not torch.compiler.is_exporting() and mask.device.type == "cpu" and bool(mask.all())

    def pack(self, grid: Tensor) -> Tensor:
        """[B, V, ...] -> [N, ...]."""
        flat = grid.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [B, V, ...] with zeros in the slots that were not computed."""
        if self.index is not None:
            flat = packed.new_zeros((self.batch * self.views, *packed.shape[1:]))
            packed = flat.index_copy(0, self.index, packed)
        unpacked: Tensor = packed.unflatten(0, (self.batch, self.views))
        return unpacked

    def rows(self, kept: Tensor, kept_slots: Slots) -> Tensor:
        """Rows of the packed values that hold the kept views: int64 [B, K] view numbers -> int64 [N']."""
        base = torch.arange(self.batch, device=kept.device)[:, None] * self.views
        flat = kept_slots.pack(base + kept)
        if self.index is None:
            return flat
        position = torch.zeros(self.batch * self.views, dtype=torch.int64, device=kept.device)
        position[self.index] = torch.arange(self.index.numel(), device=kept.device)
        return position[flat]
