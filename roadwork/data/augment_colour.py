"""Colour in one matrix: brightness, contrast, saturation and hue are linear in RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

LUMA = (0.299, 0.587, 0.114)
"""BT.601 weights of R, G, B: what kornia, torchvision and JPEG call grey."""

_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def hue_matrices(radians: Array) -> Array:
    """[N, 3, 3] turning the chroma plane of YIQ by [N] radians (> 0: red to yellow): grey and luma stay."""
    turn = np.zeros((len(radians), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(radians)
    turn[:, 1, 2], turn[:, 2, 1] = np.sin(radians), -np.sin(radians)
    matrices: Array = _YIQ_TO_RGB @ turn @ _RGB_TO_YIQ
    return matrices


def saturation_matrices(factor: Array) -> Array:
    """[N, 3, 3] blending with grey: 0 is grey, 1 the identity."""
    factor = np.asarray(factor)[:, None, None]
    matrices: Array = factor * np.eye(3) + (1 - factor) * np.broadcast_to(np.array(LUMA), (3, 3))
    return matrices


def colour_matrices(brightness: Array, contrast: Array, saturation: Array, hue: Array) -> Array:
    """[N, 3, 3] of brightness, then contrast, saturation and hue (factors [N], hue in radians).

    Contrast turns about the mean grey m of the photo: c x + (1 - c) m. Greys pass saturation and hue unchanged, so the
    constant is (1 - c) m on every channel, m being taken after brightness.
    """
    factor: Array = np.asarray(contrast * brightness)[:, None, None]
    matrices: Array = hue_matrices(hue) @ saturation_matrices(saturation) * factor
    return matrices


def mean_grey(photo: Tensor) -> Tensor:
    """Mean luma [N] of photos [N, 3, H, W]."""
    mean = photo.mean((-2, -1))
    return mean[:, 0] * LUMA[0] + mean[:, 1] * LUMA[1] + mean[:, 2] * LUMA[2]


def colour(views: Tensor, matrix: Tensor) -> Tensor:
    """matrix [N, 3, 4] applied to every pixel of views [N, 3, H, W]: rgb' = matrix[:, :3] rgb + matrix[:, 3].

    ValueError for other shapes.
    """
    if views.dim() != 4 or views.shape[1] != 3 or matrix.shape != (views.shape[0], 3, 4):
        raise ValueError(
            f"colour needs views [N, 3, H, W] and matrices [N, 3, 4], got {list(views.shape)} and {list(matrix.shape)}"
        )
    matrix = matrix.to(views.device, views.dtype)
    if not views.is_cuda:
        return torch.baddbmm(matrix[:, :, 3:], matrix[:, :, :3], views.flatten(2)).view_as(views)
    return _by_columns(views, matrix)


def _by_columns(views: Tensor, matrix: Tensor) -> Tensor:
    """Three streaming passes: as a matrix product of inner size 3 it would run in TF32 where that is allowed."""
    column = matrix[..., None, None].unbind(2)
    out = torch.addcmul(column[3], column[0], views[:, :1])
    return out.addcmul_(column[1], views[:, 1:2]).addcmul_(column[2], views[:, 2:])
