"""The challenge's own distribution: what the subnet's validator does to a photo before it asks.

streetvision-subnet, natix/utils/image_transforms.py at 128981d: one of four levels, each of probability 1/4. 0: the
photo; 1: rotation by up to 20 degrees and a square crop of 20 to 100 % of the area; 2: also saturation, contrast, down-
and up-sampling; 3: those stronger, coloured noise and Gaussian blur. Then 224 pixels a side, as JPEG (Pillow's quality
75, 4:2:0).
What differs: views stand for the photo, values are not rounded to bytes between ops, and at a view size above 224 the
result is enlarged again, so that the model sees no detail that the service would not send.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from roadwork.data.augment_blur import gaussian_blur
from roadwork.data.augment_colour import LUMA
from roadwork.data.augment_geometry import resize
from roadwork.data.augment_noise import add_noise_
from roadwork.data.augment_parameters import CHALLENGE_SIDE, Parameters

Array = NDArray[Any]

_RGB_TO_YCC = np.array([LUMA, (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)])
_YCC_TO_RGB = np.linalg.inv(_RGB_TO_YCC)

# ITU-T T.81, tables K.1 and K.2: at quality 50
_QUANT = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99",
    "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99 "
    + " ".join(["99"] * 32),
)


def challenge(photos: Tensor, p: Parameters, first: int = 0) -> Tensor:
    """Everything after geometry and colour: photos [N, V, 3, S, S] to the same shape, in [0, 1].

    Args:
        p: parameters of these photos.
        first: number of the first of these views within its photo.
    """
    n, views, _, size = photos.shape[:4]
    side = min(size, CHALLENGE_SIDE)
    x = photos.flatten(0, 1)
    if side != size:
        x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    x = x.view(n, views, 3, side, side).clamp(0, 1)
    done = [_distort(x[i], p.rows(slice(i, i + 1)), first) for i in range(n)]
    x = jpeg(torch.cat(done).clamp(0, 1))
    if side != size:
        x = resize(x, size).clamp(0, 1)
    return x.view(n, views, 3, size, size)


def _distort(x: Tensor, p: Parameters, first: int) -> Tensor:
    """Resampling, noise and blur of one photo's views [V, 3, s, s]."""
    side, factor = x.shape[-1], int(p.resample[0])
    if factor > 1:
        x = resize(resize(x, side // factor), side)
    if p.noise[0] > 0:
        colours = torch.zeros_like(x)
        add_noise_(colours[None], p.noise, p.noise_seed, first)
        x = x + _colours(colours, _YCC_TO_RGB)
    if p.gaussian[0] > 0:
        x = gaussian_blur(x.clamp(0, 1), float(p.gaussian[0]) * side / CHALLENGE_SIDE)
    return x


def _colours(x: Tensor, matrix: Array) -> Tensor:
    """matrix [3, 3] on the channels of [N, 3, H, W]."""
    out = [sum(x[:, k] * float(matrix[c, k]) for k in range(3)) for c in range(3)]
    return torch.stack([row for row in out if isinstance(row, Tensor)], 1)


def quantisation(quality: int) -> Array:
    """Tables [2, 8, 8] (luma, chroma) of libjpeg's quality 1 to 100, each 1 to 255; ValueError for another quality."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is {quality}; give 1 to 100")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = np.array([[int(v) for v in table.split()] for table in _QUANT]).reshape(2, 8, 8)
    tables: Array = np.clip((base * scale + 50) // 100, 1, 255)
    return tables


def _cosines() -> Array:
    k, i = np.arange(8)[:, None], np.arange(8)[None]
    return np.sqrt(np.where(k == 0, 1, 2) / 8) * np.cos(np.pi * (2 * i + 1) * k / 16)


def jpeg(views: Tensor, quality: int = 75) -> Tensor:
    """Views [N, 3, H, W] in [0, 1] as a JPEG (4:2:0, libjpeg's tables) would give them back; no bytes are written.

    Coefficients are rounded as a coder does, the colour transform is not rounded to bytes. No gradient.
    """
    height, width = views.shape[-2:]
    x = F.pad(views.detach(), (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = _colours(x * 255, _RGB_TO_YCC)
    tables = quantisation(quality)
    luma = _quantise(ycc[:, :1] - 128, tables[0]) + 128
    chroma = _quantise(F.avg_pool2d(ycc[:, 1:], 2), tables[1])
    # libjpeg's 'fancy' upsampling is this triangle filter
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    rgb = _colours(torch.cat([luma, chroma], 1), _YCC_TO_RGB) / 255
    return rgb[..., :height, :width].clamp(0, 1)


def _quantise(plane: Tensor, table: Array) -> Tensor:
    n, c, h, w = plane.shape
    cosine = torch.from_numpy(_cosines()).to(plane.device, plane.dtype, non_blocking=True)
    step = torch.from_numpy(table).to(plane.device, plane.dtype, non_blocking=True)
    blocks = plane.view(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    coefficient = torch.round(cosine @ blocks @ cosine.T / step) * step
    return (cosine.T @ coefficient @ cosine).transpose(3, 4).reshape(n, c, h, w)
