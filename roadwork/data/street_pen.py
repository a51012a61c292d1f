"""Drawing tools of the embedded street benchmark: sprites with alpha, smooth noise."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]] | NDArray[np.float64]
Image = NDArray[Any]
"""uint8."""
Floats = NDArray[Any]
"""float32."""

WHITE: Colour = (236, 236, 232)
BLACK: Colour = (24, 24, 26)
STEEL: Colour = (128, 132, 136)


_TURN = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)


class Pen:
    """A sprite drawn in units of its own height: x in [0, aspect], y in [0, 1] downwards.

    It is drawn at several times its final size and shrunk by area, so that a cone of 24 px has the soft edges that a
    camera would give it.
    """

    def __init__(self, height: float, aspect: float) -> None:
        """`height`: of the finished sprite in px; `aspect`: width / height."""
        self.size = (max(2, round(height * aspect)), max(2, round(height)))
        self.scale = height * float(np.clip(round(300 / max(height, 1.0)), 1, 4))
        self.aspect = aspect
        rows, columns = max(2, round(self.scale)), max(2, round(self.scale * aspect))
        self.rgb: Image = np.zeros((rows, columns, 3), np.uint8)
        self.alpha: Image = np.zeros((rows, columns), np.uint8)
        self._light = 0.0
        self._grain: Floats | None = None

    def _pixels(self, points: Points) -> NDArray[np.int32]:
        return np.rint(np.asarray(points, np.float64) * self.scale * 16).astype(np.int32)

    def poly(self, points: Points, colour: Colour) -> None:
        """A filled polygon; points [n, 2] (x, y) in units of the height."""
        pixels = self._pixels(points)
        cv2.fillPoly(self.rgb, [pixels], colour, cv2.LINE_8, 4)
        cv2.fillPoly(self.alpha, [pixels], 255, cv2.LINE_8, 4)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.poly(_CIRCLE * (rx, ry) + (x, y), colour)

    def disc(self, x: float, y: float, r: float, colour: Colour) -> None:
        self.ellipse(x, y, r, r, colour)

    def discs(self, centres: NDArray[np.float64], r: float, colours: Sequence[Colour]) -> None:
        """Discs of one size over each other; centres [n, 2]."""
        outlines = self._pixels(centres[:, None] + _CIRCLE * (r, r))
        for outline, colour in zip(outlines, colours, strict=True):
            cv2.fillPoly(self.rgb, [outline], colour, cv2.LINE_8, 4)
            cv2.fillPoly(self.alpha, [outline], 255, cv2.LINE_8, 4)

    def line(self, points: Points, width: float, colour: Colour) -> None:
        """A stroke with round ends; points [n, 2] and `width` in units of the height."""
        pixels = self._pixels(points)
        thickness = max(1, round(width * self.scale))
        cv2.polylines(self.rgb, [pixels], False, colour, thickness, cv2.LINE_8, 4)
        cv2.polylines(self.alpha, [pixels], False, 255, thickness, cv2.LINE_8, 4)

    def stripes(self, points: Points, first: Colour, second: Colour, pitch: float, slope: float = 1.0) -> None:
        """A polygon [n, 2] filled with bands; `pitch`: length of a pair along x; `slope`: 1 = 45 degrees, 0 upright."""
        self.poly(points, first)
        left, top = (float(edge) * self.scale for edge in np.asarray(points).min(axis=0))
        clip = np.zeros(self.alpha.shape, np.uint8)
        pixels = self._pixels(points)
        cv2.fillPoly(clip, [pixels], 1, cv2.LINE_8, 4)
        box = tuple(  # only the polygon's surroundings are walked over; an outline may round to a pixel outside
            slice(max(0, low // 16 - 1), high // 16 + 2) for low, high in zip(pixels.min(0), pixels.max(0), strict=True)
        )[::-1]
        rows, columns = np.ogrid[: len(clip), : len(clip[0])]
        phase = (columns[:, box[1]] - left + slope * (rows[box[0]] - top)) / (pitch * self.scale)
        self.rgb[box][(clip[box] > 0) & (phase % 1.0 >= 0.5)] = second

    def shade(self, rng: np.random.Generator, strength: float = 0.25, grain: float = 10.0) -> None:
        """Light from one side, and grain, over the whole sprite."""
        rows, columns = max(2, self.size[1] // 2), max(2, self.size[0] // 2)
        self._light = strength * float(rng.choice([-1.0, 1.0]))
        self._grain = rng.normal(0, grain, (rows, columns)).astype(np.float32)

    def finish(self) -> tuple[Floats, Floats]:
        """(colour [h, w, 3] times alpha, alpha [h, w] in 0..1)."""
        rgb = cv2.resize(self.rgb, self.size, interpolation=cv2.INTER_AREA).astype(np.float32)
        alpha = cv2.resize(self.alpha, self.size, interpolation=cv2.INTER_AREA).astype(np.float32) / np.float32(255)
        if self._grain is not None:
            ramp = 1.0 + self._light * np.linspace(-1, 1, self.size[0], dtype=np.float32)
            rgb *= ramp[None, :, None]
            rgb += (cv2.resize(self._grain, self.size) * alpha)[..., None]
        return rgb, alpha


def add_grey(image: Image, grey: Floats) -> Image:
    """uint8 `image` [h, w, 3] plus `grey` [h, w] in every channel, saturated. (Three times as fast as broadcasting.)"""
    return cv2.add(image, cv2.merge([grey, grey, grey]), dtype=cv2.CV_8U)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int, octaves: int = 3) -> Floats:
    """Value noise [height, width], zero mean, about unit spread; `cells` across the width in the coarsest octave."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        across = min(width, cells << octave)
        down = max(2, min(height, round(across * height / width)))
        coarse = rng.standard_normal((down, max(2, across)), dtype=np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR) * np.float32(0.6**octave)
    return total


def vary(rng: np.random.Generator, colour: Colour, spread: float = 10.0) -> Colour:
    """`colour` with a random change of brightness and, less, of tint."""
    return _shifted(colour, spread, rng.standard_normal(4).tolist())


def _shifted(colour: Colour, spread: float, normals: Sequence[float]) -> Colour:
    """`colour` changed by four standard normal numbers: one for all channels, then one for each."""
    bright, *tints = normals
    red, green, blue = (
        min(255, max(0, int(c + (spread * bright + spread / 3 * tint)))) for c, tint in zip(colour, tints, strict=True)
    )
    return red, green, blue


def vary_many(normals: NDArray[np.float64], colour: Colour, spread: float) -> list[Colour]:
    """`vary` for each row of standard normal numbers [n, 4]."""
    return [_shifted(colour, spread, row) for row in normals.tolist()]


def pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 8.0) -> Colour:
    """One of `colours`, varied."""
    return vary(rng, colours[int(rng.integers(len(colours)))], spread)
