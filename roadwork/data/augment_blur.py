"""Blur by adding shifted copies: on a CPU several times faster than a grouped convolution of so few taps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def gaussian_weights(sigma: Array) -> Array:
    """float64 [N, 2 r + 1], each cut at 3 of its own sigma, r for the largest; sigma 0 is the identity."""
    sigma = np.asarray(sigma, np.float64)
    reach = np.ceil(3 * sigma)
    radius = int(reach.max(initial=0))
    tap = np.arange(-radius, radius + 1)
    weight = np.exp(-0.5 * (tap / np.maximum(sigma, 1e-3)[:, None]) ** 2) * (np.abs(tap) <= reach[:, None])
    share: Array = weight / weight.sum(1, keepdims=True)
    return share


def gaussian_blur(views: Tensor, sigma: Tensor | Array | float) -> Tensor:
    """Separable Gaussian blur of views [N, C, H, W], borders reflected.

    Args:
        sigma: pixels, one number or [N]. It decides the number of taps, so a tensor should live on the CPU.

    Raises:
        ValueError: another shape, a sigma that is negative or not finite, or views no larger than the taps' radius.
    """
    if views.dim() != 4:
        raise ValueError(f"gaussian_blur needs views [N, C, H, W], got {list(views.shape)}")
    if isinstance(sigma, Tensor):
        sigma = sigma.detach().cpu().numpy()
    sigma = np.broadcast_to(np.asarray(sigma, np.float64), (views.shape[0],))
    if not np.isfinite(sigma).all() or (sigma < 0).any():
        raise ValueError(f"gaussian_blur needs finite sigma >= 0, got {sigma.tolist()}")
    weight = gaussian_weights(sigma)
    radius = weight.shape[1] // 2
    if radius == 0:
        return views
    if radius >= min(views.shape[-2:]):
        raise ValueError(f"gaussian_blur of sigma {sigma.max():g} needs views larger than {radius} px")
    if views.is_cuda:
        return _by_convolution(views, weight)
    if (sigma == sigma[0]).all():
        return _by_shifts(_by_shifts(views, weight[0], -1), weight[0], -2)
    return torch.cat([gaussian_blur(view[None], s) for view, s in zip(views, sigma, strict=True)])


def _by_shifts(views: Tensor, weight: Array, axis: int) -> Tensor:
    radius, size = len(weight) // 2, views.shape[axis]
    padded = F.pad(views, (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius), mode="reflect")
    out = padded.narrow(axis, radius, size) * float(weight[radius])
    for i in range(len(weight)):
        if i != radius:
            out.add_(padded.narrow(axis, i, size), alpha=float(weight[i]))
    return out


def _by_convolution(views: Tensor, weight: Array) -> Tensor:
    n, c, h, w = views.shape
    radius = weight.shape[1] // 2
    kernel = torch.from_numpy(weight).to(views.device, views.dtype, non_blocking=True).repeat_interleave(c, 0)
    flat = F.pad(views, (radius,) * 4, mode="reflect").reshape(1, n * c, h + 2 * radius, w + 2 * radius)
    rows = F.conv2d(flat, kernel[:, None, None, :], groups=n * c)
    return F.conv2d(rows, kernel[:, None, :, None], groups=n * c).view(n, c, h, w)


def motion_steps(vector: Array) -> list[tuple[int, int]]:
    """Whole-pixel shifts (x, y) whose successive averages spread a point along `vector` [2] pixels.

    Averaging with a copy shifted by 1/2, then 1/4, 1/8, ... of the vector gives 2^k equal taps along it: k passes
    instead of 2^k. Steps are rounded, and stop where they round to nothing.
    """
    length = float(np.hypot(*vector))
    if length < 0.75:
        return []
    passes = max(1, math.ceil(math.log2(length + 1)))
    taps = 2**passes
    # taps sit at i (L) / (taps - 1), i < taps: the ends are exactly L apart
    unit = np.asarray(vector, float) / (taps - 1)
    steps = [(int(round(unit[0] * 2**k)), int(round(unit[1] * 2**k))) for k in range(passes)]
    return [step for step in steps if step != (0, 0)]


def motion_blur(views: Tensor, vector: Array) -> Tensor:
    """Views [N, C, H, W] smeared along `vector` [2] = (x, y) pixels, centred, borders repeated."""
    steps = motion_steps(vector)
    if not steps:
        return views
    # each average eats its shift; half of all shifts on either side keeps size and centre
    total_x, total_y = abs(sum(s[0] for s in steps)), abs(sum(s[1] for s in steps))
    left, top = total_x // 2, total_y // 2
    out = F.pad(views, (left, total_x - left, top, total_y - top), mode="replicate")
    for x, y in steps:
        out = _average(out, x, y)
    return out


def _average(views: Tensor, x: int, y: int) -> Tensor:
    """Mean of the view and its copy shifted by (x, y), where both are known."""
    height, width = views.shape[-2] - abs(y), views.shape[-1] - abs(x)
    first = views[..., max(y, 0) : max(y, 0) + height, max(x, 0) : max(x, 0) + width]
    second = views[..., max(-y, 0) : max(-y, 0) + height, max(-x, 0) : max(-x, 0) + width]
    return torch.lerp(first, second, 0.5)
