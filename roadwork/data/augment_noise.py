"""Gaussian noise from one bank of normal numbers, read at a place keyed by (seed, epoch, position, view).

A generator per photo would be slow on a CPU and differ between devices. A window of a fixed bank costs one addition,
and gives the same numbers on every device, in every batch and on any number of processes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roadwork.data.augment_parameters import mix

Array = NDArray[Any]

_PLACES = 4096
_STRIDE = 521  # prime: windows of neighbouring places do not line up with rows of pixels
_BANK_SEED = 20251107


@lru_cache(maxsize=8)
def _bank(length: int, device: torch.device) -> Tensor:
    """float32 normal numbers for windows of `length`; made on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(_BANK_SEED)
    return torch.randn(_PLACES * _STRIDE + length, generator=generator).to(device)


def noise_windows(seed: Array, views: int, first: int = 0) -> tuple[Array, Array]:
    """Place in the bank [N, views] and sign (+1, -1) of the views first, first + 1, ... of photos with seeds [N]."""
    with np.errstate(over="ignore"):
        drawn = mix(seed[:, None] + np.arange(first + 1, first + views + 1, dtype=np.uint64))
    return (drawn % np.uint64(_PLACES)).astype(np.int64), 1.0 - 2.0 * (drawn >> np.uint64(63)).astype(np.float64)


def add_noise_(photos: Tensor, std: Array, seed: Array, first: int = 0) -> Tensor:
    """Independent Gaussian noise on every value of photos [N, V, C, H, W], in place.

    Args:
        std: [N] standard deviation.
        seed: [N] uint64, a photo's own.
        first: number of the first of these views within its photo.
    """
    n, views = photos.shape[:2]
    length = photos[0, 0].numel()
    bank = _bank(length, photos.device)
    place, sign = noise_windows(seed, views, first)
    scale = sign * std[:, None]
    if photos.is_cuda:
        return _by_rows(photos, bank, place, scale)
    for i in range(n):
        for v in range(views):
            start = int(place[i, v]) * _STRIDE
            window = bank[start : start + length].view(photos.shape[2:])
            photos[i, v].add_(window, alpha=float(scale[i, v]))
    return photos


def _by_rows(photos: Tensor, bank: Tensor, place: Array, scale: Array) -> Tensor:
    """The same in two launches for all photos."""
    windows = bank.unfold(0, photos[0, 0].numel(), _STRIDE)
    rows = windows.index_select(0, torch.from_numpy(place.reshape(-1)).to(photos.device, non_blocking=True))
    factor = torch.from_numpy(scale).to(photos.device, photos.dtype, non_blocking=True)
    return photos.addcmul_(rows.view_as(photos).to(photos.dtype), factor[..., None, None, None])
