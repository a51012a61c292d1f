"""The deterministic list of mild augmentations for test time; the first is the photo itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roadwork.errors import UserError

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601."""
SMALLEST_SIGMA = 0.6
"""Pixels; a narrower Gaussian changes nothing (at sigma 0.1 its neighbours weigh exactly 0 in fp32)."""
KINDS: tuple[tuple[str, ...], ...] = (
    ("flip",),
    ("rotate", "brighten"),
    ("zoom",),
    ("flip", "unrotate", "darken"),
    ("contrast",),
    ("blur",),
    ("saturate",),
    ("hue",),
    ("rotate",),
    ("flip", "zoom"),
    ("darken",),
    ("fade",),
    ("unhue",),
    ("unrotate",),
    ("flip", "brighten", "desaturate"),
)
"""What augmentations 1, 2, ... do; the most unlike ones come first, so that a short list is still varied."""


@dataclass(frozen=True)
class Transform:
    """One augmentation; the defaults are the identity.

    degrees: rotation; zoom: magnification about the centre; brightness, contrast, saturation: factors; hue: degrees;
    blur: Gaussian sigma as a share of the view's side. No number depends on the photo.
    """

    flip: bool = False
    degrees: float = 0.0
    zoom: float = 1.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    blur: float = 0.0

    def __call__(self, views: Tensor, view_mask: Tensor) -> Tensor:
        """views float [B,V,3,S,S] in [0,1], view_mask bool [B,V] -> the same shape; the identity returns `views`."""
        if self == Transform():
            return views
        changed = self._geometry(views)
        changed = self._colour(changed, view_mask)
        return gaussian_blur(changed, max(SMALLEST_SIGMA, self.blur * views.shape[-1])) if self.blur > 0 else changed

    def _geometry(self, views: Tensor) -> Tensor:
        if self.degrees == 0.0 and self.zoom == 1.0:
            return views.flip(-1) if self.flip else views
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle) / self.zoom, math.sin(angle) / self.zoom
        mirror = -1.0 if self.flip else 1.0
        theta = torch.tensor([[mirror * cos, -sin, 0.0], [mirror * sin, cos, 0.0]], device=views.device)
        side = views.shape[-1]
        grid = F.affine_grid(theta[None], [1, 1, side, side], align_corners=False).to(views.dtype)
        flat = views.reshape(1, -1, side, side)  # one grid for all views: their channels ride together
        return F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False).view_as(views)

    def _colour(self, views: Tensor, view_mask: Tensor) -> Tensor:
        matrix = self.colour_matrix().to(views)
        plain = torch.equal(matrix, torch.eye(3).to(views))
        if not plain:
            views = torch.einsum("ij,bvjhw->bvihw", matrix, views)
        if self.contrast != 1.0:
            weights = view_mask.to(views.dtype)
            grey = torch.einsum("j,bvjhw->bv", torch.tensor(LUMA).to(views), views) / views.shape[-1] ** 2
            mean = (grey * weights).sum(1) / weights.sum(1).clamp_min(1.0)
            views = torch.lerp(mean[:, None, None, None, None].expand_as(views), views, self.contrast)
        return views if plain and self.contrast == 1.0 else views.clamp(0.0, 1.0)

    def colour_matrix(self) -> Tensor:
        """[3,3] float32: hue rotation in the YIQ plane, then saturation, then brightness."""
        to_yiq = torch.tensor([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
        angle = math.radians(self.hue)
        turn = torch.tensor(
            [[1.0, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]]
        )
        hue = torch.linalg.inv(to_yiq) @ turn @ to_yiq if self.hue else torch.eye(3)
        grey = torch.tensor(LUMA).expand(3, 3)
        saturation = torch.eye(3) if self.saturation == 1.0 else torch.lerp(grey, torch.eye(3), self.saturation)
        return self.brightness * (saturation @ hue)


def gaussian_blur(views: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of `sigma` pixels with reflected borders; views [B,V,3,S,S]."""
    side = views.shape[-1]
    radius = min(max(1, math.ceil(3 * sigma)), side - 1)
    offsets = torch.arange(-radius, radius + 1, device=views.device, dtype=views.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = views.reshape(-1, 1, side, side)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="reflect"), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="reflect"), kernel.view(1, 1, -1, 1))
    return flat.view_as(views)


def transforms(number: int, seed: int, degrees: float = 10.0, colour: float = 0.15) -> list[Transform]:
    """`number` augmentations, the identity first.

    Magnitudes are drawn once from the seed between a third of the widest and the widest: rotation and hue up to
    `degrees`, factors in 1 +- `colour`, zoom to 1 + `colour`, blur up to 1/256 of the side. A shorter list is the
    beginning of a longer one. Raises UserError outside 1..16.
    """
    if not 1 <= number <= 1 + len(KINDS):
        raise UserError(f"predict.num_augmentations is {number}; give 1 (the photo alone) to {1 + len(KINDS)}")
    rng = np.random.default_rng([seed, 0xF00D5])
    made = [Transform()]
    for place in range(number - 1):
        size = rng.uniform(1 / 3, 1.0, size=8)
        made.append(_transform(KINDS[place], size, degrees, colour))
    return made


def _transform(kinds: tuple[str, ...], size: np.ndarray, degrees: float, colour: float) -> Transform:
    values: dict[str, tuple[str, Any]] = {
        "rotate": ("degrees", degrees * size[0]),
        "unrotate": ("degrees", -degrees * size[0]),
        "zoom": ("zoom", 1 + colour * size[1]),
        "brighten": ("brightness", 1 + colour * size[2]),
        "darken": ("brightness", 1 - colour * size[2]),
        "contrast": ("contrast", 1 + colour * size[3]),
        "fade": ("contrast", 1 - colour * size[3]),
        "saturate": ("saturation", 1 + colour * size[4]),
        "desaturate": ("saturation", 1 - colour * size[4]),
        "hue": ("hue", degrees * size[5]),
        "unhue": ("hue", -degrees * size[5]),
        "blur": ("blur", size[6] / 256),
        "flip": ("flip", True),
    }
    chosen = dict(values[kind] for kind in kinds)
    magnitudes: dict[str, Any] = {name: value if value is True else float(value) for name, value in chosen.items()}
    return Transform(**magnitudes)
