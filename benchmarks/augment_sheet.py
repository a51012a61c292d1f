"""Contact sheet: every op of the augmentation at three strengths, for a person to look at."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from roadwork.config import AugmentConfig
from roadwork.data.augment import Augment
from roadwork.data.augment_colour import colour_matrices
from roadwork.data.augment_geometry import from_corners, rotations, zooms
from roadwork.data.augment_parameters import Array, Parameters, draw

_SIDE = 512
_TILE = 184
_PHOTO = {"rain": 0, "fog": 1, "shadow": 0, "glare": 1, "brightness": 0}  # where they are best seen
_NONE: dict[str, Any] = {name: 0.0 for name in vars(AugmentConfig()) if name.endswith("_p")}


def _three(**changes: Array) -> Parameters:
    """Three photos with nothing but `changes`."""
    return dataclasses.replace(draw(AugmentConfig(**_NONE), 0, 0, np.arange(3)), **changes)


def _geometry(matrix: Array) -> Parameters:
    return _three(homography=matrix, warp=np.ones(3, bool))


def _colour(which: int, values: list[float]) -> Parameters:
    arrays = [np.ones(3), np.ones(3), np.ones(3), np.zeros(3)]
    arrays[which] = np.array(values)
    return _three(matrix=colour_matrices(*arrays), contrast=(1 - arrays[1]) * arrays[0], coloured=np.ones(3, bool))


def _ops(config: AugmentConfig) -> list[tuple[str, list[str], Parameters]]:
    """Name, captions and parameters of every op at a third, two thirds and all of its largest draw."""
    third = np.array([1, 2, 3]) / 3
    shift = np.random.default_rng(3).uniform(-1, 1, (4, 2)) * third[:, None, None] * config.perspective_scale
    turn, hue = third * config.rotation_degrees, third * config.hue_degrees
    low, high = config.zoom_range
    bright, contrast, saturated = (
        [1 - size, 1 + size / 2, 1 + size] for size in (config.brightness, config.contrast, config.saturation)
    )
    tilt = [-hue[2], hue[1], hue[2]]
    length, sigma = third * config.motion_blur_pixels, third * config.gaussian_blur_sigma
    std, fog = third * config.noise_std, third * config.fog_density
    shade, glare = third * config.shadow_strength, third * config.glare_strength
    sun = np.array([[-0.5, -0.6, 0.35], [0.35, -0.5, 0.4], [0.1, -0.75, 0.5]])
    edge = np.array([[0.5, -0.2, 0.25, 0.03], [2.4, 0.1, 0.35, 0.05], [1.2, 0.2, 0.5, 0.08]])
    along = np.stack([length * np.cos([0.0, 0.6, 2.2]), length * np.sin([0.0, 0.6, 2.2])], 1)

    def text(values: Array | list[float], form: str) -> list[str]:
        return [form.format(v) for v in values]

    return [
        ("flip", ["off", "on", "on"], _three(flip_only=np.array([False, True, True]))),
        ("rotation", text(turn, "{:.0f} degrees"), _geometry(rotations(np.radians(turn)))),
        ("perspective", text(third * config.perspective_scale, "{:.2f}"), _geometry(from_corners(shift))),
        ("zoom", [f"{low}", "1.15", f"{high}"], _geometry(zooms(np.array([low, 1.15, high])))),
        ("brightness", text(bright, "{:.2f}"), _colour(0, bright)),
        ("contrast", text(contrast, "{:.2f}"), _colour(1, contrast)),
        ("saturation", text(saturated, "{:.2f}"), _colour(2, saturated)),
        ("hue", text(tilt, "{:.0f} degrees"), _colour(3, list(np.radians(tilt)))),
        ("rain", text(third, "{:.2f}"), _three(rain=third, rain_angle=np.radians([8.0, -12.0, 20.0]))),
        ("fog", text(fog, "opacity {:.2f}"), _three(fog=fog)),
        ("shadow", text(shade, "{:.2f}"), _three(shadow=shade, shadow_shape=edge)),
        ("glare", text(glare, "{:.2f}"), _three(glare=glare, glare_shape=sun)),
        ("noise", text(std, "std {:.3f}"), _three(noise=std)),
        ("motion blur", text(length, "{:.0f} px of 512"), _three(motion=along)),
        ("Gaussian blur", text(sigma, "sigma {:.2f}"), _three(gaussian=sigma)),
        ("challenge", ["level 1", "level 2", "level 3"], _levels()),
    ]


def _levels() -> Parameters:
    """The first photo of each of the challenge's levels 1 to 3, the strongest of its kind."""
    p = draw(AugmentConfig(challenge_p=1.0), 0, 0, np.arange(4000))
    plain = (p.resample == 1) & ~p.coloured & (p.gaussian == 0) & (p.noise == 0)
    rows = [
        np.flatnonzero(p.warp & plain)[0],
        np.flatnonzero(p.coloured & (p.resample == 2) & (p.gaussian == 0) & (p.noise == 0))[0],
        np.flatnonzero(p.coloured & (p.resample == 3) & (p.gaussian > 1.4) & (p.noise > 0.05))[0],
    ]
    return p.rows(np.array(rows))


def _photos(paths: list[Path]) -> torch.Tensor:
    """The three photos [3, 1, 3, S, S]: squares of the given files, or of the embedded street benchmark."""
    if paths:
        arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    else:
        street: Any = importlib.import_module("roadwork.data.street")

        arrays = [np.asarray(street.draw(i, 0).rgb) for i in (1, 2, 4)]  # two by day, one by night
    views = []
    for array in (arrays * 3)[:3]:
        image = Image.fromarray(array)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        views.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    return torch.stack(views)[:, None]


def write_sheet(path: Path, photos: list[Path]) -> None:
    """Two ops a line, each the photo and three strengths, under 400 kB."""
    config = AugmentConfig()
    views, augment, font = _photos(photos), Augment(config), ImageFont.load_default(13)
    ops = _ops(config)
    lines, cell = (len(ops) + 1) // 2, _TILE + 18
    sheet = Image.new("RGB", (8 * _TILE + 12, lines * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, captions, p) in enumerate(ops):
        x, y = (i % 2) * (4 * _TILE + 12), (i // 2) * cell
        which = _PHOTO.get(name, i % 3)
        photo = views[which : which + 1]
        done, _ = augment.with_parameters(photo.expand(3, -1, -1, -1, -1).contiguous(), p)
        row = [photo[0, 0], *done[:, 0]]
        for k, (tile, caption) in enumerate(zip(row, [name, *captions], strict=True)):
            image = Image.fromarray((tile * 255).round().byte().permute(1, 2, 0).numpy())
            sheet.paste(image.resize((_TILE, _TILE), Image.Resampling.LANCZOS), (x + k * _TILE, y + 18))
            pen.text((x + k * _TILE + 3, y + 2), caption, fill="black", font=font)
    for quality in range(85, 20, -5):
        sheet.save(path, quality=quality, optimize=True)
        if path.stat().st_size < 400_000:
            return
