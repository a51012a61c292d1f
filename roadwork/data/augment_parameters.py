"""What happens to each photo: drawn on the CPU, a pure function of (seed, epoch, position)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roadwork.config import AugmentConfig
from roadwork.data.augment_colour import colour_matrices
from roadwork.data.augment_geometry import flips, from_corners, rotations, zooms

Array = NDArray[Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# One number per decision and photo. Only ever append: the place of a name is part of the random stream.
_SLOTS = (
    *("challenge", "flip", "rotation", "rotation_size", "perspective", "zoom", "zoom_size"),
    *(f"corner_{i}" for i in range(8)),
    *("brightness", "brightness_size", "contrast", "contrast_size", "saturation", "saturation_size", "hue", "hue_size"),
    *("rain", "rain_size", "rain_angle", "rain_seed", "fog", "fog_size", "fog_tint", "fog_seed"),
    *("shadow", "shadow_size", "shadow_angle", "shadow_place", "shadow_width", "shadow_soft"),
    *("glare", "glare_size", "glare_x", "glare_y", "glare_radius", "glare_tint"),
    *("noise", "noise_size", "noise_seed", "motion", "motion_size", "motion_angle", "gaussian", "gaussian_size"),
    *("level", "crop_area", "crop_x", "crop_y", "level_saturation", "level_contrast"),
    *("level_resample", "level_noise", "level_blur"),
)
_SLOT = {name: i for i, name in enumerate(_SLOTS)}

CHALLENGE_SIDE = 224
"""Pixels a side of what the subnet's validator sends; its blur and its blocks are measured in these."""


def mix(x: Array) -> Array:
    """splitmix64's finaliser (Steele et al. 2014): uint64 of any shape to well-mixed uint64."""
    x = np.asarray(x, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed


def keys(seed: int, epoch: Array, position: Array) -> Array:
    """uint64 [B], one per photo, from (seed, epoch, position): independent of order, batch and process.

    epoch, position: integers [B], or one for all.
    """
    with np.errstate(over="ignore"):
        start = mix(np.array([int(seed) % 2**64], np.uint64) + _GOLDEN)
        state = mix(start ^ (np.asarray(epoch).astype(np.uint64) * _GOLDEN + np.uint64(1)))
        return mix(state ^ (np.asarray(position).astype(np.uint64) * _GOLDEN + np.uint64(2)))


def stream(key: Array, count: int) -> Array:
    """float64 [B, count] uniform in [0, 1): the counter-based stream of each key."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return (mix(np.asarray(key, np.uint64)[:, None] + counter) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Parameters:
    """Arrays over photos [B, ...]; a neutral value where an op does not hit a photo. Nothing here touches a device."""

    flip_only: Array
    """bool: mirrored and not warped, so exact."""
    warp: Array
    """bool: needs interpolation."""
    homography: Array
    """[3, 3] output to input, coordinates in [-1, 1]."""
    coloured: Array
    """bool: the colour matrix is not the identity."""
    matrix: Array
    """[3, 3] colour."""
    contrast: Array
    """k: k times the photo's mean grey is added to every channel (contrast turns about the mean)."""
    rain: Array
    """Amount, 0 (none) to 1."""
    rain_angle: Array
    """Of the streaks from the vertical, radians."""
    rain_seed: Array
    """uint64."""
    fog: Array
    """Opacity at the farthest, 0 (none) to 1."""
    airlight: Array
    """[3] colour of the fog."""
    fog_seed: Array
    """uint64."""
    shadow: Array
    """Darkening, 0 (none) to 1."""
    shadow_shape: Array
    """[4] angle (radians), place, half width, softness (halves of the view)."""
    glare: Array
    """Added light around the burnt core, 0 (none) to 1."""
    glare_shape: Array
    """[3] x, y in [-1, 1] and radius (halves of the view)."""
    glare_colour: Array
    """[3]."""
    noise: Array
    """Standard deviation, 0: none."""
    noise_seed: Array
    """uint64."""
    motion: Array
    """[2] blur vector (x, y), pixels of a 512 px view; 0: none."""
    gaussian: Array
    """Sigma, pixels of a 512 px view; 0: none."""
    challenge: Array
    """bool: sees the challenge's distribution instead of all of the above but geometry and colour."""
    resample: Array
    """Factor of down- and up-sampling, 1: none."""

    def rows(self, index: Array | slice) -> Parameters:
        """The same for some of the photos."""
        return Parameters(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.warp)


def draw(config: AugmentConfig, seed: int, epoch: Array | int, position: Array) -> Parameters:
    """Parameters of the photos at stream positions [B]; `epoch` is one number or [B]."""
    position = np.asarray(position, np.int64)
    key = keys(seed, np.broadcast_to(np.asarray(epoch, np.int64), position.shape), position)
    table = stream(key, len(_SLOTS))
    u = {name: table[:, i] for name, i in _SLOT.items()}
    seeds = {name: mix(key + np.uint64(_SLOT[name])) for name in ("rain_seed", "fog_seed", "noise_seed")}

    def hit(name: str, probability: float) -> Array:
        return u[name] < min(1.0, probability * config.probability_scale)

    challenge = hit("challenge", config.challenge_p)
    values: dict[str, Array] = {"challenge": challenge, **seeds}
    values.update(_geometry(config, u, hit, challenge))
    values.update(_colour(config, u, hit, challenge))
    values.update(_weather(config, u, hit))
    values.update(_camera(config, u, hit))
    for name in ("rain", "fog", "shadow", "glare", "motion", "noise", "gaussian"):
        values[name] = np.where(_like(challenge, values[name]), 0.0, values[name])
    values["resample"] = np.ones(len(position), np.int64)
    _challenge(values, u)
    return Parameters(**values)


def _like(mask: Array, values: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (values.ndim - 1))


def _either(config: AugmentConfig, u: Array, size: float) -> Array:
    """Uniform in +- size, scaled."""
    return (2 * u - 1) * size * config.magnitude_scale


def _geometry(config: AugmentConfig, u: dict[str, Array], hit: Any, challenge: Array) -> dict[str, Array]:
    n, scale = len(challenge), config.magnitude_scale
    flip = hit("flip", config.flip_p) & ~challenge  # the validator's flips never happen
    angle = np.where(
        hit("rotation", config.rotation_p), _either(config, u["rotation_size"], config.rotation_degrees), 0
    )
    zoom_low, zoom_high = (max(1 + (z - 1) * scale, 0.05) for z in config.zoom_range)
    zoom = np.where(hit("zoom", config.zoom_p), zoom_low + (zoom_high - zoom_low) * u["zoom_size"], 1.0)
    corner = np.stack([u[f"corner_{i}"] for i in range(8)], 1).reshape(n, 4, 2)
    shift = _either(config, corner, config.perspective_scale)
    shift[~hit("perspective", config.perspective_p)] = 0
    matrix = flips(flip) @ rotations(np.radians(angle)) @ from_corners(shift) @ zooms(zoom)
    warp = (angle != 0) | (zoom != 1) | (shift != 0).any((1, 2))
    # challenge levels 1 to 3: rotate by up to 20 degrees, then a square crop of 20 to 100 % of the area
    level = np.floor(4 * u["level"])
    turn = np.radians(20 * (2 * u["rotation_size"] - 1))
    side = np.sqrt(0.2 + 0.8 * u["crop_area"])
    place = np.stack([(2 * u["crop_x"] - 1) * (1 - side), (2 * u["crop_y"] - 1) * (1 - side)], 1)
    crop = rotations(turn) @ zooms(1 / side, place)
    cropped = challenge & (level > 0)
    matrix = np.where(cropped[:, None, None], crop, matrix)
    matrix[challenge & (level == 0)] = np.eye(3)
    warp = np.where(challenge, cropped, warp)
    return {"flip_only": flip & ~warp, "warp": warp, "homography": matrix}


def _colour(config: AugmentConfig, u: dict[str, Array], hit: Any, challenge: Array) -> dict[str, Array]:
    def factor(name: str, probability: float, size: float) -> Array:
        drawn = np.maximum(1 + _either(config, u[f"{name}_size"], size), 0)
        return np.where(hit(name, probability) & ~challenge, drawn, 1.0)

    brightness = factor("brightness", config.brightness_p, config.brightness)
    contrast = factor("contrast", config.contrast_p, config.contrast)
    saturation = factor("saturation", config.saturation_p, config.saturation)
    turn = np.where(hit("hue", config.hue_p) & ~challenge, _either(config, u["hue_size"], config.hue_degrees), 0.0)
    # challenge: levels 2 and 3 draw each distortion's strength from 0..1 and 0..2, 0 leaves it out
    step = _steps(u)
    saturation = np.where(challenge, np.array([1.0, 0.4, 0.3])[step["saturation"]], saturation)
    brightness = np.where(challenge, np.array([1.0, 0.85, 0.725])[step["contrast"]], brightness)
    coloured = (brightness != 1) | (contrast != 1) | (saturation != 1) | (turn != 0)
    matrix = colour_matrices(brightness, contrast, saturation, np.radians(turn))
    return {"coloured": coloured, "matrix": matrix, "contrast": (1 - contrast) * brightness}


def _steps(u: dict[str, Array]) -> dict[str, Array]:
    """Strength 0, 1 or 2 of each of the challenge's distortions."""
    level = np.floor(4 * u["level"]).astype(int)
    top = np.where(level == 3, 3, np.where(level == 2, 2, 1))
    hard = np.where(level == 3, 3, 1)
    steps = {name: np.floor(u[f"level_{name}"] * top).astype(int) for name in ("saturation", "contrast", "resample")}
    return steps | {name: np.floor(u[f"level_{name}"] * hard).astype(int) for name in ("noise", "blur")}


def _weather(config: AugmentConfig, u: dict[str, Array], hit: Any) -> dict[str, Array]:
    scale = config.magnitude_scale

    def amount(name: str, probability: float, largest: float, smallest: float) -> Array:
        share = smallest + (1 - smallest) * u[f"{name}_size"]  # a hit that nobody sees would be a wasted hit
        return np.where(hit(name, probability), np.clip(share * largest * scale, 0, 1), 0.0)

    shape = [
        np.pi * u["shadow_angle"],
        1.2 * u["shadow_place"] - 0.6,
        0.15 + 0.45 * u["shadow_width"],
        0.02 + 0.08 * u["shadow_soft"],
    ]
    grey = 0.72 + 0.2 * u["fog_tint"]
    warm = u["glare_tint"]
    return {
        "rain": amount("rain", config.rain_p, 1.0, 0.25),
        "rain_angle": np.radians(50 * u["rain_angle"] - 25),
        "fog": amount("fog", config.fog_p, config.fog_density, 0.25),
        "airlight": np.stack([grey, grey + 0.01, grey + 0.02], 1),
        "shadow": amount("shadow", config.shadow_p, config.shadow_strength, 0.3),
        "shadow_shape": np.stack(shape, 1),
        "glare": amount("glare", config.glare_p, config.glare_strength, 0.3),
        "glare_shape": np.stack(
            [1.6 * u["glare_x"] - 0.8, 0.9 * u["glare_y"] - 0.95, 0.25 + 0.35 * u["glare_radius"]], 1
        ),
        "glare_colour": np.stack([np.ones_like(warm), 1 - 0.08 * warm, 1 - 0.3 * warm], 1),
    }


def _camera(config: AugmentConfig, u: dict[str, Array], hit: Any) -> dict[str, Array]:
    scale = config.magnitude_scale
    length = (3 + (config.motion_blur_pixels - 3) * u["motion_size"]) * scale
    length = np.where(hit("motion", config.motion_blur_p), np.maximum(length, 0), 0.0)
    angle = np.pi * u["motion_angle"]
    sigma = (0.25 + 0.75 * u["gaussian_size"]) * config.gaussian_blur_sigma * scale
    noise = (0.25 + 0.75 * u["noise_size"]) * config.noise_std * scale
    return {
        "motion": np.stack([length * np.cos(angle), length * np.sin(angle)], 1),
        "gaussian": np.where(hit("gaussian", config.gaussian_blur_p), sigma, 0.0),
        "noise": np.where(hit("noise", config.noise_p), noise, 0.0),
    }


def _challenge(values: dict[str, Array], u: dict[str, Array]) -> None:
    """The challenge's own strengths, where it is drawn (streetvision-subnet, natix/utils/image_transforms.py)."""
    challenge, step = values["challenge"], _steps(u)
    values["resample"] = np.where(challenge, np.array([1, 2, 3])[step["resample"]], values["resample"])
    # the validator adds noise of variance v to YCbCr in studio range, so a full-range value gets 255 / 219 of it
    std = np.sqrt([0.0, 0.001, 0.002])[step["noise"]] * 255 / 219
    values["noise"] = np.where(challenge, std, values["noise"])
    # cv2.GaussianBlur(k, sigma = k / 6) with k = 7, 9 pixels of 224
    values["gaussian"] = np.where(challenge, np.array([0, 7 / 6, 9 / 6])[step["blur"]], values["gaussian"])
