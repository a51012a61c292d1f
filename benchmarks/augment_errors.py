"""How far each op of the augmentation is from its counterpart in kornia or torchvision, for `benchmarks.augment`.

Fog has no counterpart. Rain, shadow and glare have none with the same picture: kornia's are drawn from its own random
fields (streaks of pixels, plasma), so there is nothing to subtract; `tests/data/test_augment_weather.py` holds ours to
coverage and brightness instead.
"""

from __future__ import annotations

import math

import kornia
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn

from roadwork.data.augment import colour, gaussian_blur, motion_blur, warp
from roadwork.data.augment_challenge import jpeg
from roadwork.data.augment_colour import colour_matrices, mean_grey
from roadwork.data.augment_geometry import flips, from_corners, rotations, zooms
from roadwork.data.augment_noise import add_noise_
from roadwork.data.augment_parameters import Array

SIZE, NOISE_STD = 64, 0.04


def max_errors(device: torch.device) -> dict[str, float]:
    """Largest difference of a pixel in [0, 1] on smooth pictures, by op and reference; of noise, that of mean and deviation.

    `hue_torchvision` is large by design (0.13 at most): ours turns in YIQ, one matrix with the other colours, which keeps
    grey and luma; torchvision's turns in HSV, which does neither. `jpeg_*` are what a
    coefficient makes that is rounded the other way.
    """
    coarse = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    x = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1).to(device) * 0.4 + 0.3
    pairs = {**_geometry(x), **_colours(x), **_blurs(x), **_codec(x)}
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()} | _noise(device)


def _geometry(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    bilinear = TF.InterpolationMode.BILINEAR
    matrix = from_corners(np.random.default_rng(0).uniform(-0.15, 0.15, (2, 4, 2)))
    pixels = np.array([[SIZE / 2, 0, (SIZE - 1) / 2], [0, SIZE / 2, (SIZE - 1) / 2], [0, 0, 1]])
    forward = torch.from_numpy(pixels @ np.linalg.inv(matrix) @ np.linalg.inv(pixels)).float().to(x.device)

    def moved(matrices: Array) -> Tensor:
        return warp(x, torch.from_numpy(matrices).float())

    inside = (..., slice(2, -2), slice(2, -2))  # torchvision rounds its fill at the outermost pixels
    turned = TF.rotate(x, 15.0, interpolation=bilinear)
    zoomed = TF.affine(x, 0.0, [0, 0], 1.3, [0.0, 0.0], interpolation=bilinear)
    return {
        "flip_torchvision": (moved(flips(np.array([True, True]))), TF.horizontal_flip(x)),
        "rotation_torchvision": (moved(rotations(np.radians([15.0, 15.0])))[inside], turned[inside]),
        "zoom_torchvision": (moved(zooms(np.array([1.3, 1.3]))), zoomed),
        "perspective_kornia": (moved(matrix), kornia.geometry.transform.warp_perspective(x, forward, (SIZE, SIZE))),
    }


def _colours(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    def ours(brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0) -> Tensor:
        arrays = [np.full(2, value) for value in (brightness, contrast, saturation, hue)]
        linear = torch.from_numpy(colour_matrices(*arrays)).float().to(x.device)
        shift = ((1 - contrast) * brightness * mean_grey(x))[:, None, None].expand(-1, 3, 1)
        return colour(x, torch.cat([linear, shift], 2))

    steps = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x, 1.2), 0.8), 0.8)
    return {
        "brightness_torchvision": (ours(brightness=1.3), TF.adjust_brightness(x, 1.3)),
        "contrast_torchvision": (ours(contrast=0.7), TF.adjust_contrast(x, 0.7)),
        "contrast_kornia": (ours(contrast=0.7), kornia.enhance.adjust_contrast_with_mean_subtraction(x, 0.7)),
        "saturation_torchvision": (ours(saturation=1.2), TF.adjust_saturation(x, 1.2)),
        "colour_torchvision": (ours(1.2, 0.8, 0.8), steps),
        "hue_torchvision": (ours(hue=math.radians(15)), TF.adjust_hue(x, 15 / 360)),
    }


def _blurs(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    straight = kornia.filters.motion_blur(x, 15, 0.0, 0.0, border_type="replicate")  # 15 taps: a line of 14 px
    return {
        "gaussian_blur_torchvision": (gaussian_blur(x, 2.0), TF.gaussian_blur(x, [13, 13], [2.0, 2.0])),
        "gaussian_blur_kornia": (gaussian_blur(x, 2.0), kornia.filters.gaussian_blur2d(x, (13, 13), (2.0, 2.0))),
        "motion_blur_kornia": (motion_blur(x, np.array([14.0, 0.0])), straight),
    }


def _codec(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of the challenge's photos. torchvision's is libjpeg itself, kornia's a formula like ours."""
    levels = (x * 255).round()
    ours, theirs = jpeg(levels / 255, 75), [TF.jpeg(picture, 75) for picture in levels.byte().cpu()]
    formula = kornia.enhance.jpeg_codec_differentiable(levels / 255, torch.full((len(x),), 75.0, device=x.device))
    return {"jpeg_torchvision": (ours.cpu(), torch.stack(theirs).float() / 255), "jpeg_kornia": (ours, formula)}


def _noise(device: torch.device) -> dict[str, float]:
    """Draws differ, so moments are compared: of 2 x 3 x 256 x 256 values around a grey."""
    torch.manual_seed(0)
    grey = torch.full((1, 2, 3, 256, 256), 0.5, device=device)
    ours = add_noise_(grey.clone(), np.array([NOISE_STD]), np.arange(1, dtype=np.uint64))
    theirs = TF.gaussian_noise(grey, 0.0, NOISE_STD)
    return {
        "noise_mean_torchvision": float((ours.mean() - theirs.mean()).abs()),
        "noise_std_torchvision": float((ours.std() - theirs.std()).abs()),
    }
