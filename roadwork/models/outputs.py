"""What goes from one part of the detector to the next, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from roadwork.models.backbone import State
from roadwork.models.slots import Slots


@dataclass
class Choice:
    """Which views go on after pruning, and what was seen of all of them."""

    kept: Tensor
    """int64 [B, K] numbers of the kept views, ascending; 0 where there is none."""
    scores: Tensor
    """fp32 [B, V] pruning scores (zeros without pruning)."""
    low: Tensor
    """[B, D] mean over ALL valid views of the backbone's vectors at the pruning depth."""


@dataclass
class Partial:
    """A batch between two units of the backbone."""

    state: State
    """Activations of the computed slots, one after the other: [N, ...]."""
    unit: int
    """Units that are done."""
    slots: Slots
    """Where the N views belong in the padded batch [B, K]."""
    mask: Tensor
    """bool [B, K] views that are there, where the caller's mask lies."""
    boxes: Tensor
    """fp32 [N, 4] boxes as fractions of the photo."""
    choice: Choice | None = None
    """Set once views were pruned."""

    def padded(self) -> dict[str, Tensor]:
        """Everything as tensors with one row per photo, by name: what `restored` needs."""
        rows = {"x": self.slots.unpack(self.state.x), "view_mask": self.mask, "boxes": self.slots.unpack(self.boxes)}
        return rows | ({} if self.choice is None else vars(self.choice))

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], unit: int, state: Callable[[Tensor], State]) -> Partial:
        """The inverse of `padded`; state: from activations [N, ...] to the backbone's state."""
        mask, x = tensors["view_mask"].cpu(), tensors["x"]
        slots = Slots.of(mask, x.device)
        choice = {name: tensors[name] for name in ("kept", "scores", "low") if name in tensors}
        made = Choice(**choice) if choice else None
        return Partial(state(slots.pack(x)), unit, slots, mask, slots.pack(tensors["boxes"]), made)


@dataclass
class Encoded:
    """A batch after the backbone, pruning and projection: everything before the first layer of attention and experts.

    Padded with zeros and masked. It depends on the photo alone, so folds compute it once and keep it.
    """

    tokens: Tensor
    """[B, K, hidden] projected view tokens with their positions."""
    view_mask: Tensor
    """bool [B, K] kept views that are there; on the tokens' device."""
    kept: Tensor
    """int64 [B, K] numbers of the kept views, ascending; 0 where there is none."""
    scores: Tensor
    """fp32 [B, V] pruning scores (zeros without pruning)."""
    low: Tensor
    """[B, D] mean over ALL valid views of the backbone's vectors at the pruning depth."""
    patches: Tensor | None = None
    """[B, K, C, h, w] patch tokens for the segmentation decoder."""
    boxes: Tensor | None = None
    """fp32 [B, K, 4] boxes of the kept views as fractions of the photo."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        """Apply a function to every tensor."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {k: None if v is None else function(v) for k, v in values.items()}
        return Encoded(**changed)

    def to(self, device: torch.device | str) -> Encoded:
        """Copy to a device."""
        return self.map(lambda t: t.to(device))

    def select(self, rows: Tensor) -> Encoded:
        """Some photos, int64 [n]."""
        return self.map(lambda t: t[rows])

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """Photos of several batches, padded to the largest number of views."""
        slots = max(p.tokens.shape[1] for p in parts)
        views = max(p.scores.shape[1] for p in parts)
        joined: dict[str, Any] = {}
        for f in dataclasses.fields(Encoded):
            tensors = [getattr(p, f.name) for p in parts]
            if any(t is None for t in tensors):
                joined[f.name] = None
            elif f.name == "low":
                joined[f.name] = torch.cat(tensors)
            else:
                length = views if f.name == "scores" else slots
                joined[f.name] = torch.cat([_pad(t, length) for t in tensors])
        return Encoded(**joined)


def _pad(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing]) if missing else x


@dataclass
class Outputs:
    """What the detector says about a batch. Logits are fp32."""

    logits: Tensor
    """[B, 2] no roadwork, roadwork."""
    view_logits: Tensor
    """[B, K, 2] of the shared view head."""
    view_mask: Tensor
    """bool [B, K]."""
    kept: Tensor
    """int64 [B, K]."""
    weather_logits: Tensor
    """[B, 8]."""
    seg_logits: Tensor | None
    """[B, K, 6, size, size]; zeros for padding; None where skipped."""
    features: Tensor
    """[B, hidden] fused vision features."""
    view_features: Tensor
    """[B, K, hidden]."""
    depth_features: tuple[Tensor, Tensor, Tensor]
    """[B, *] at three depths: backbone at the pruning depth, projected tokens, fused features."""
    balance: Tensor
    """fp32 0-d: load balance over all processes of this micro-step (see `roadwork.models.moe.balance_loss`)."""
    expert_load: Tensor
    """fp32 [L, E], detached: share of the choices per expert."""
    scores: Tensor
    """fp32 [B, V] pruning scores."""
    attention: Tensor
    """fp32 [B, K] weights of the views in the fusion; they sum to 1."""
