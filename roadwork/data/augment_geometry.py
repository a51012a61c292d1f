"""Geometry in one interpolation: flip, rotation, perspective and zoom are one homography.

Coordinates are those of `torch.nn.functional.grid_sample(align_corners=False)`: x to the right and y down, -1 and 1
the outer borders of a square view. Matrices map OUTPUT places to INPUT places, so products read from right to left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def _identity(n: int) -> Array:
    return np.broadcast_to(np.eye(3), (n, 3, 3)).copy()


def flips(mirrored: Array) -> Array:
    """Horizontal mirror where `mirrored` [N] bool."""
    matrix = _identity(len(mirrored))
    matrix[mirrored, 0, 0] = -1
    return matrix


def rotations(radians: Array) -> Array:
    """Picture turned counter-clockwise (as kornia and torchvision do) by [N] radians about its centre."""
    matrix = _identity(len(radians))
    matrix[:, 0, 0] = matrix[:, 1, 1] = np.cos(radians)
    matrix[:, 0, 1] = -np.sin(radians)
    matrix[:, 1, 0] = np.sin(radians)
    return matrix


def zooms(factor: Array, centre: Array | None = None) -> Array:
    """Picture enlarged by [N] (> 1: fewer things, larger); `centre` [N, 2] input place that comes to the middle."""
    matrix = _identity(len(factor))
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / np.asarray(factor)
    if centre is not None:
        matrix[:, :2, 2] = centre
    return matrix


def from_corners(shift: Array) -> Array:
    """Homography that takes the input from the corners (-1,-1), (1,-1), (1,1), (-1,1) moved by `shift` [N, 4, 2]."""
    matrix = _identity(len(shift))
    moved = np.flatnonzero((shift != 0).any((1, 2)))
    if not len(moved):
        return matrix
    corner = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    goal = corner + shift[moved]
    x, y = np.broadcast_to(corner[:, 0], goal.shape[:2]), np.broadcast_to(corner[:, 1], goal.shape[:2])
    one, zero = np.ones_like(x), np.zeros_like(x)
    u, v = goal[..., 0], goal[..., 1]
    left = np.concatenate(
        [
            np.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1),
            np.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1),
        ],
        1,
    )
    right = np.concatenate([u, v], 1)[..., None]
    solved = np.linalg.solve(left, right)[..., 0]
    matrix[moved] = np.concatenate([solved, np.ones((len(moved), 1))], 1).reshape(-1, 3, 3)
    return matrix


def sampling_grid(matrix: Tensor, height: int, width: int) -> Tensor:
    """Input places [N, height, width, 2] of every output pixel under homographies [N, 3, 3]."""
    dtype, device = matrix.dtype, matrix.device
    x = (torch.arange(width, device=device, dtype=dtype) * 2 + 1) / width - 1
    y = (torch.arange(height, device=device, dtype=dtype) * 2 + 1) / height - 1
    # H (x, y, 1) as a sum of a row and a column: no [N, H, W, 3] matrix product
    place = matrix[:, None, :, 0] * x[:, None]
    place = place[:, None] + (matrix[:, None, :, 1] * y[:, None] + matrix[:, None, :, 2])[:, :, None]
    # behind the camera there is nothing to see: such points are sent far outside
    depth = place[..., 2:]
    depth = torch.where(depth > 1e-6, depth, 1e-6)
    return place[..., :2] / depth


def resize(views: Tensor, size: int) -> Tensor:
    """Views [N, C, H, W] at size x size, as `F.interpolate(mode="bilinear", align_corners=False)` defines it.

    `F.interpolate` takes another kernel, with another rounding, on one thread than on many. Here each step is one rounding
    of each value, so the pixels do not depend on how many threads a process has.
    """
    for axis in (-1, -2):
        length = views.shape[axis]
        place = (torch.arange(size, device=views.device, dtype=torch.float64) + 0.5) * (length / size) - 0.5
        place = place.clamp_(0, length - 1)
        low = place.long()
        high = (low + 1).clamp_(max=length - 1)
        share = (place - low).to(views.dtype)
        share = share if axis == -1 else share[:, None]
        near, far = views.index_select(axis, low), views.index_select(axis, high)
        views = near.mul_(1 - share).add_(far.mul_(share))
    return views


def sample(views: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Pixels of views [N, C, H, W] at grid [N, h, w, 2]; black outside."""
    return F.grid_sample(views, grid.to(views.dtype), mode=mode, padding_mode="zeros", align_corners=False)


def warp(views: Tensor, matrix: Tensor, mode: str = "bilinear") -> Tensor:
    """Views [N, C, H, W] under homographies [N, 3, 3] (output to input, coordinates in [-1, 1]); black outside.

    ValueError for other shapes.
    """
    if views.dim() != 4 or matrix.shape != (views.shape[0], 3, 3):
        raise ValueError(
            f"warp needs views [N, C, H, W] and matrices [N, 3, 3], got {list(views.shape)} and {list(matrix.shape)}"
        )
    return sample(views, sampling_grid(matrix.to(views.device, torch.float32), *views.shape[-2:]), mode)
