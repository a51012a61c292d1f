"""Weather and time of day over a drawn street: night and its lamps, low sun, rain, snow, fog, the camera itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from roadwork.data.street_pen import Colour, Floats, Image, smooth_noise
from roadwork.data.street_scene import HEIGHT, WIDTH, Frame

WEATHERS = ("Sunny", "Partly Cloudy", "Cloudy", "Rain", "Snow", "Fog")


@dataclass(frozen=True)
class Conditions:
    """What the sky does. `weather`: of WEATHERS; `daytime`: Light, Twilight, Dark; `glare`: a low sun ahead."""

    weather: str
    daytime: str
    glare: bool

    @property
    def cloud(self) -> float:
        return {"Sunny": 0.05, "Partly Cloudy": 0.4}.get(self.weather, 0.95)

    @property
    def visibility(self) -> float:
        return {"Fog": 45.0, "Snow": 120.0, "Rain": 160.0}.get(self.weather, 700.0)

    @property
    def haze(self) -> Colour:
        return (196, 202, 206)


def _gain(image: Floats, gains: Sequence[float], mix: float = 0.0, offset: float = 0.0) -> Floats:
    """Each channel times its gain, plus `mix` times the sum of all channels, plus `offset`: one pass."""
    matrix = np.concatenate([np.diag(gains) + mix, np.full((3, 1), offset)], 1).astype(np.float32)
    return cv2.transform(image, matrix)


def _three(grey: Floats) -> Floats:
    return cv2.merge([grey, grey, grey])


def _night(image: Floats, frame: Frame, rng: np.random.Generator, dark: bool) -> Floats:
    """Dim everything but what street lamps and the car's own headlights reach; then let the lamps shine."""
    shrink = 8
    rows, columns = HEIGHT // shrink, WIDTH // shrink
    ys, xs = np.mgrid[:rows, :columns].astype(np.float32) * shrink
    camera = frame.camera
    ambient = float(rng.uniform(0.24, 0.34)) if dark else float(rng.uniform(0.55, 0.70))
    light = np.full((rows, columns), ambient, np.float32)
    headlight = np.exp(-(((xs - camera.centre) / 420) ** 2) - ((ys - camera.horizon - 120) / 130) ** 2)
    light += (0.55 if dark else 0.15) * headlight
    glow = np.zeros((rows, columns, 3), np.float32)
    lamplight = np.zeros((rows, columns), np.float32)
    for column, row, radius, colour in frame.lamps:
        if not (-200 < column < WIDTH + 200 and -200 < row < HEIGHT + 200):
            continue
        pool = np.exp(
            -(((xs - column) / (radius * 9 + 30)) ** 2) - ((ys - row - radius * 10) / (radius * 12 + 40)) ** 2
        )
        np.maximum(lamplight, (0.42 if dark else 0.1) * pool, out=lamplight)
        halo = np.exp(-((xs - column) ** 2 + (ys - row) ** 2) / (radius * 2.0 + 4) ** 2)
        strength = (0.9 if dark else 0.5) * min(1.0, 0.3 + radius / 12)
        np.maximum(glow, halo[..., None] * np.asarray(colour, np.float32) * np.float32(strength), out=glow)
    lit = cv2.resize(np.minimum(light + lamplight, 1.05), (WIDTH, HEIGHT))
    image = _gain(cv2.multiply(image, _three(lit)), (0.86, 0.92, 1.12) if dark else (1.04, 0.92, 0.96))
    return cv2.add(image, cv2.resize(glow, (WIDTH, HEIGHT)))


def _rain(image: Floats, frame: Frame, rng: np.random.Generator) -> Floats:
    """Grey light, a wet road that mirrors what stands on it, streaks."""
    image = _gain(image, (0.68, 0.68, 0.68), mix=0.05)
    top = int(frame.camera.horizon) + 6
    depth = min(HEIGHT - top, top)
    mirror = cv2.resize(image[top - depth : top][::-1], (WIDTH // 8, max(2, depth // 8)), interpolation=cv2.INTER_AREA)
    strength = np.linspace(0.34, 0.0, depth, dtype=np.float32)[:, None, None]
    image[top:] *= np.float32(0.78)
    image[top : top + depth] += (cv2.resize(mirror, (WIDTH, depth)) - np.float32(20)) * strength
    streaks: Image = np.zeros((HEIGHT, WIDTH), np.uint8)
    slant = float(rng.uniform(-0.25, 0.25))
    for x, y, length in rng.uniform((0, 0, 14), (WIDTH, HEIGHT, 46), (260, 3)):
        cv2.line(streaks, (int(x), int(y)), (int(x + slant * length), int(y + length)), 60, 1)
    return cv2.add(image, _three(cv2.blur(streaks, (2, 3)).astype(np.float32)))


def _snow(image: Floats, rng: np.random.Generator) -> Floats:
    image = _gain(image, (0.86, 0.86, 0.86), offset=26)
    flakes: Image = np.zeros((HEIGHT, WIDTH), np.uint8)
    for x, y, radius in rng.uniform((0, 0, 0.6), (WIDTH, HEIGHT, 3.0), (320, 3)):
        cv2.circle(flakes, (int(x), int(y)), int(radius), 200, -1)
    soft = _three(cv2.GaussianBlur(flakes, (5, 5), 1.0).astype(np.float32) / np.float32(255))
    return image + soft * (np.float32(244) - image)


def _glare(image: Floats, frame: Frame, rng: np.random.Generator) -> Floats:
    """A sun just over the horizon washes out what lies around it."""
    column, row = (float(rng.uniform(0.15, 0.85)) * WIDTH, frame.camera.horizon - float(rng.uniform(20, 160)))
    ys, xs = np.mgrid[: HEIGHT // 8, : WIDTH // 8].astype(np.float32) * 8
    distance = (xs - column) ** 2 + (ys - row) ** 2
    bright = 190 * np.exp(-distance / 110.0**2) + 85 * np.exp(-distance / 420.0**2)
    return cv2.add(image, _gain(_three(cv2.resize(bright, (WIDTH, HEIGHT))), (1.0, 0.90, 0.70)))


def expose(frame: Frame, conditions: Conditions, rng: np.random.Generator) -> Image:
    """The finished photo, uint8 [720, 1280, 3]: light, weather, lens and sensor applied to the painted street."""
    image: Floats = frame.rgb.astype(np.float32)
    if conditions.weather in ("Sunny", "Partly Cloudy") and conditions.daytime == "Light":
        image = _gain(image, (1.06, 1.03, 0.97))
    elif conditions.weather == "Cloudy":
        image = _gain(image, (0.88, 0.88, 0.88))
    if conditions.weather == "Rain":
        image = _rain(image, frame, rng)
    elif conditions.weather == "Snow":
        image = _snow(image, rng)
    if conditions.daytime != "Light":
        image = _night(image, frame, rng, conditions.daytime == "Dark")
    if conditions.glare:
        image = _glare(image, frame, rng)
    image = _gain(image, list(float(rng.uniform(0.88, 1.10)) * rng.uniform(0.95, 1.05, 3)))
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (3, 3), float(rng.uniform(0.4, 0.9)))
    patchy = cv2.resize(smooth_noise(rng, 18, 32, 4, 2) * np.float32(2.5), (WIDTH, HEIGHT))
    strength = np.float32((9.0 if conditions.daytime == "Dark" else 4.0) / 104.0)
    first, second = rng.integers(0, 256, (2, HEIGHT, WIDTH), np.uint8)
    grain = cv2.add(first, second, dtype=cv2.CV_32F) * strength + (patchy - np.float32(255) * strength)
    return cv2.add(image, _three(grain), dtype=cv2.CV_8U)
