"""What augmentation refuses: tensors of the wrong shape or type, and pixels that are no fractions."""

from __future__ import annotations

from numbers import Integral
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from roadwork.data.augment_parameters import Array


def check_inputs(
    views: Tensor, key: Tensor, epoch: int | Tensor, seed: int, masks: Tensor | None, view_mask: Tensor | None
) -> None:
    """Shapes and types as `Augment` takes them; reads no pixel. Raises ValueError."""
    if not isinstance(views, Tensor) or views.dim() != 5 or views.shape[2] != 3 or views.shape[3] != views.shape[4]:
        raise ValueError(f"augmentation needs views [B, V, 3, S, S], got {_told(views)}")
    if not views.is_floating_point():
        raise ValueError(f"augmentation needs float views in [0, 1], got {views.dtype}; divide bytes by 255")
    if not _whole(key) or key.shape != views.shape[:1]:
        raise ValueError(f"augmentation needs one key per photo, int64 [{views.shape[0]}], got {_told(key)}")
    if not isinstance(epoch, Integral) and not (_whole(epoch) and epoch.shape in ((), views.shape[:1])):
        raise ValueError(f"augmentation needs one epoch, or int64 [{views.shape[0]}] of them, got {_told(epoch)}")
    if not isinstance(seed, Integral):
        raise ValueError(f"augmentation needs one whole number as its seed, got {_told(seed)}")
    if masks is not None and (masks.dim() != 5 or masks.shape[:2] != views.shape[:2]):
        raise ValueError(f"masks must be [B, V, C, h, w] with the views' B and V, got {list(masks.shape)}")
    if masks is not None and not (masks.is_floating_point() or masks.dtype in (torch.uint8, torch.bool)):
        raise ValueError(f"masks must be floats, uint8 or bool, got {masks.dtype}")
    if view_mask is not None and view_mask.dtype != torch.bool:
        raise ValueError(f"view_mask must be bool, got {view_mask.dtype}")
    if view_mask is not None and view_mask.shape != views.shape[:2]:
        raise ValueError(f"view_mask must be {list(views.shape[:2])}, got {list(view_mask.shape)}")


def check_range(views: Tensor, there: Array) -> None:
    """ValueError for pixels outside [0, 1] or NaN in views [1, V, ...] of one photo where `there` [V] bool; a CPU only."""
    if not there.all():
        views = views[:, torch.from_numpy(np.flatnonzero(there))]
    if not views.numel():
        return
    low, high = (float(bound) for bound in views.aminmax())
    if not -0.01 <= low <= high <= 1.01:
        raise ValueError(f"augmentation needs views in [0, 1], these range from {low:.3g} to {high:.3g}")


def _whole(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def _told(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
