"""Weather, light and noise, which no library has in this form: what each field must look like, by its own formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import kornia
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.config import AugmentConfig
from roadwork.data.augment import Augment
from roadwork.data.augment_noise import add_noise_, noise_windows
from roadwork.data.augment_parameters import Parameters, draw
from roadwork.data.augment_weather import (
    apply_fields,
    fog_field,
    glare_field,
    rain_field,
    shadow_field,
    weather_fields,
)

SIZE = 64
CPU, FLOAT = torch.device("cpu"), torch.float32
OFF: dict[str, Any] = {name: 0.0 for name in vars(AugmentConfig()) if name.endswith("_p")}
WEATHER = ("rain", "fog", "shadow", "glare")
PHOTOMETRIC = (*WEATHER, "brightness", "contrast", "saturation", "hue", "motion_blur", "gaussian_blur")
ALL_OPS = (*PHOTOMETRIC, "noise", "flip", "rotation", "perspective", "zoom", "challenge")


def only(name: str, **more: Any) -> AugmentConfig:
    return AugmentConfig(**(OFF | {f"{name}_p": 1.0} | more))


def fields(p: Parameters, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    return weather_fields(p, size, CPU, FLOAT)


def line(n: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    values = (torch.arange(n, dtype=torch.float32) * 2 + 1) / n - 1
    return values.view(1, 1, 1, n), values.view(1, 1, n, 1)


# --------------------------------------------------------------------------------------------- every op alike


@pytest.mark.parametrize("name", ALL_OPS)
@pytest.mark.parametrize("fill", [0.0, 1.0, 0.5])
def test_extreme_pictures_stay_finite_and_in_range(name: str, fill: float) -> None:
    """Black, white and grey: where a division by a mean, a logarithm or a screen blend would show."""
    views = torch.full((4, 2, 3, SIZE, SIZE), fill)
    out, _ = Augment(only(name))(views, torch.arange(4), 3, 11)
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("name", ALL_OPS)
def test_each_op_is_a_function_of_seed_epoch_and_position(name: str) -> None:
    views = torch.rand(6, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    views[1:] = views[:1]  # the same photo at six positions
    augment = Augment(only(name, motion_blur_pixels=80, gaussian_blur_sigma=12.0))
    first, _ = augment(views, torch.arange(6), 0, 0)
    again, _ = augment(views, torch.arange(6), 0, 0)
    assert torch.equal(first, again)
    if name != "flip":  # a flip has nothing else to draw
        different = {tuple(photo.flatten()[:500].tolist()) for photo in first}
        assert len(different) >= 4, "positions share their draws"


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_light_falls_alike_on_all_views_of_a_photo_and_on_no_mask(name: str) -> None:
    view = torch.rand(1, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    masks = (torch.rand(3, 4, 6, 16, 16) > 0.5).to(torch.uint8)
    out, moved = Augment(only(name))(view.expand(3, 4, -1, -1, -1).contiguous(), torch.arange(3), 0, 5, masks)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert torch.equal(moved, masks)


@pytest.mark.parametrize("name", ["contrast", "saturation", "noise", "motion_blur", "zoom", "perspective"])
def test_strength_zero_changes_nothing(name: str) -> None:
    views = torch.rand(4, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
    masks = (torch.rand(4, 2, 6, 16, 16, generator=torch.Generator().manual_seed(7)) > 0.5).to(torch.uint8)
    out, moved = Augment(only(name, magnitude_scale=0.0))(views, torch.arange(4), 0, 0, masks)
    torch.testing.assert_close(out, views, atol=1e-5, rtol=0)
    assert torch.equal(moved, masks)


@pytest.mark.parametrize("name", ["rain", "fog", "shadow", "glare", "noise", "gaussian_blur"])
def test_half_the_magnitude_is_half_the_strength(name: str) -> None:
    column = "gaussian" if name == "gaussian_blur" else name
    whole, half = (
        getattr(draw(only(name, magnitude_scale=scale), 3, 1, np.arange(500)), column) for scale in (1.0, 0.5)
    )
    assert (whole > 0).all()
    np.testing.assert_allclose(half, whole / 2, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in ALL_OPS if name != "challenge"])
def test_fine_tunings_half_probability_hits_a_subset_of_the_same_photos(name: str) -> None:
    """The decision is one number against a threshold: halving it drops photos and changes no other one."""
    position = np.arange(4000)
    config = dataclasses.replace(AugmentConfig(), **(OFF | {f"{name}_p": 0.8}))
    full, half = (draw(dataclasses.replace(config, probability_scale=s), 1, 0, position) for s in (1.0, 0.5))
    hit = {"full": changed(full), "half": changed(half)}
    assert not (hit["half"] & ~hit["full"]).any()
    assert hit["full"].mean() == pytest.approx(0.8, abs=0.03) and hit["half"].mean() == pytest.approx(0.4, abs=0.03)
    for field in dataclasses.fields(Parameters):
        a, b = getattr(full, field.name), getattr(half, field.name)
        np.testing.assert_array_equal(a[hit["half"]], b[hit["half"]])


def changed(p: Parameters) -> np.ndarray:
    """bool [N]: photos to which anything happens."""
    return (
        p.flip_only | p.warp | p.coloured | (p.rain > 0) | (p.fog > 0) | (p.shadow > 0) | (p.glare > 0)
        | (p.noise > 0) | (p.motion != 0).any(1) | (p.gaussian > 0) | p.challenge
    )  # fmt: skip


def test_rows_of_parameters_are_those_photos() -> None:
    p = draw(AugmentConfig(), 5, 0, np.arange(50))
    part = p.rows(np.array([7, 3]))
    assert len(p) == 50 and len(part) == 2
    alone = draw(AugmentConfig(), 5, 0, np.array([7, 3]))
    for field in dataclasses.fields(Parameters):
        np.testing.assert_array_equal(getattr(part, field.name), getattr(alone, field.name))


def test_an_epoch_for_each_photo() -> None:
    together = draw(AugmentConfig(), 5, np.array([0, 3, 3]), np.array([9, 9, 10]))
    for row, (epoch, position) in enumerate([(0, 9), (3, 9), (3, 10)]):
        alone = draw(AugmentConfig(), 5, epoch, np.array([position]))
        np.testing.assert_array_equal(together.homography[row], alone.homography[0])
        assert together.noise_seed[row] == alone.noise_seed[0]


# ------------------------------------------------------------------------------------------------ the fields


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([16, 33, 64]))
def test_fields_keep_and_add_in_range_so_that_no_pixel_can_leave_it(position: int, size: int) -> None:
    config = AugmentConfig(**(OFF | dict.fromkeys((f"{name}_p" for name in WEATHER), 1.0)))
    keep, add = fields(draw(config, 0, 0, np.array([position, position + 1])), size)
    assert keep.shape == (2, 1, size, size) and add.shape == (2, 3, size, size)
    assert keep.isfinite().all() and add.isfinite().all()
    assert keep.min() >= 0 and keep.max() <= 1 and add.min() >= 0 and add.max() <= 1


def test_applying_fields_is_one_multiply_and_add_for_every_view() -> None:
    g = torch.Generator().manual_seed(0)
    photos, keep = torch.rand(2, 3, 3, 8, 8, generator=g), torch.rand(2, 1, 8, 8, generator=g)
    add = torch.rand(2, 3, 8, 8, generator=g)
    torch.testing.assert_close(apply_fields(photos, keep, add), photos * keep[:, None] + add[:, None])


def test_without_weather_nothing_is_taken_and_nothing_added() -> None:
    keep, add = fields(draw(AugmentConfig(**OFF), 0, 0, np.arange(3)))
    assert (keep == 1).all() and (add == 0).all()


def test_a_shadow_only_darkens_and_by_no_more_than_its_strength() -> None:
    p = draw(only("shadow"), 2, 0, np.arange(40))
    keep, add = fields(p)
    assert not add.any()
    least = keep.flatten(1).min(1).values.numpy()
    assert (least >= 1 - p.shadow - 1e-6).all()
    assert ((keep > 0.999).flatten(1).any(1)).float().mean() > 0.9, "some of the view stays in the light"


def test_a_shadow_is_a_band_where_it_is_put() -> None:
    x, y = line()
    upright = shadow_field(torch.tensor([[0.0, 0.25, 0.3, 0.02]]), x, y)[0, 0]
    row = upright[SIZE // 2]
    place = x.flatten()
    inside = (place - 0.25).abs() < 0.2
    outside = (place - 0.25).abs() > 0.45
    assert row[inside].min() > 0.9 and row[outside].max() < 0.1
    turned = shadow_field(torch.tensor([[math.pi / 2, 0.25, 0.3, 0.02]]), x, y)[0, 0]
    assert turned[SIZE // 2].std() < turned[:, SIZE // 2].std(), "a quarter turn lays the band across"


def test_fog_follows_koschmieders_law() -> None:
    """Opacity 1 - (1 - density) ** depth: with density 0 there is none, and it thins from the horizon downwards."""
    _, y = line()
    lattice = torch.full((3, 97), 0.5)
    density = torch.tensor([0.0, 0.3, 0.9])
    opacity = fog_field(density, lattice, y)
    assert opacity[0].abs().max() == 0
    depth = torch.log1p(-opacity[1:]) / torch.log1p(-density[1:]).view(-1, 1, 1, 1)
    torch.testing.assert_close(depth[0], depth[1], rtol=1e-4, atol=1e-4)  # depth is the scene's, not the fog's
    for layer in opacity[1:]:
        rows = layer[0].mean(1)
        assert (rows.diff() <= 1e-6).all() and rows[0] > 1.3 * rows[-1]


@pytest.mark.parametrize("density", [0.0, 0.5, 0.98, 1.0])
def test_the_densest_fog_is_finite(density: float) -> None:
    _, y = line()
    opacity = fog_field(torch.tensor([density]), torch.rand(1, 97), y)
    assert opacity.isfinite().all() and opacity.min() >= 0 and opacity.max() <= 1


def test_fog_draws_every_colour_towards_grey_air() -> None:
    p = draw(only("fog", fog_density=0.95), 0, 0, np.arange(20))
    keep, add = fields(p)
    assert (keep < 1).any() and (np.ptp(p.airlight, axis=1) <= 0.021).all()
    air = torch.from_numpy(p.airlight).float()[:, :, None, None]
    torch.testing.assert_close(add, (1 - keep) * air, atol=1e-6, rtol=0)


def test_glare_burns_out_at_the_sun_and_fades_away_from_it() -> None:
    x, y = line()
    light = glare_field(torch.tensor([[0.0, 0.0, 0.3]]), x, y)[0, 0]
    middle = SIZE // 2
    assert light[middle, middle] > 2 and light.min() >= 0.12
    ring = [float(light[middle, middle + step]) for step in (0, 6, 12, 20, 28)]
    assert ring == sorted(ring, reverse=True)
    shifted = glare_field(torch.tensor([[0.5, -0.5, 0.3]]), x, y)[0, 0]
    row, column = divmod(int(shifted.argmax()), SIZE)
    assert abs(column - 48) <= 1 and abs(row - 16) <= 1


def test_glare_is_rays_of_six_and_the_triple_angle_is_right() -> None:
    """The rays are written without an arc tangent: compared with the formula that they stand for."""
    x, y = line()
    light = glare_field(torch.tensor([[0.0, 0.0, 0.4]]), x, y)[0, 0].double()
    dx, dy = torch.meshgrid(x.flatten().double(), y.flatten().double(), indexing="xy")
    square = dx**2 + dy**2
    distance = torch.sqrt(square + 1e-4)
    angle = torch.atan2(dy, dx)
    shrunk = torch.sqrt(square) / distance  # the softened centre shortens the cosine
    cosine = torch.cos(angle) * shrunk
    rays = (4 * cosine**3 - 3 * cosine).abs() ** 24 * torch.exp(-distance / 0.64)
    expected = 2 * torch.exp(-square / 0.14**2) + 0.75 * torch.exp(-distance / 0.4) + 0.12 + 0.3 * rays
    torch.testing.assert_close(light, expected, atol=1e-4, rtol=1e-4)


def test_glare_never_darkens_and_leaves_white_white() -> None:
    views = torch.rand(8, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4)) * 0.5
    out, _ = Augment(only("glare"))(views, torch.arange(8), 0, 0)
    assert (out - views).min() > -0.03, "only the tint of the light may take a little of one colour"
    white, _ = Augment(only("glare"))(torch.ones(8, 1, 3, SIZE, SIZE), torch.arange(8), 0, 0)
    assert white.min() > 0.6


def test_more_rain_is_more_and_brighter_streaks() -> None:
    random = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    covered = [
        float(rain_field(torch.tensor([amount]), torch.zeros(1), random, 256).mean()) for amount in (0.0, 0.3, 0.6, 1.0)
    ]
    assert covered[0] == 0 and covered == sorted(covered) and 0.003 < covered[-1] < 0.2


def test_rain_falls_along_its_angle() -> None:
    """Streaks are longer than wide: brightness changes least along the fall."""
    random = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(3))
    upright = rain_field(torch.ones(1), torch.zeros(1), random, 256)[0, 0]
    assert upright.diff(dim=0).abs().mean() < 0.5 * upright.diff(dim=1).abs().mean()
    angle = math.radians(20)
    tilted = rain_field(torch.ones(1), torch.full((1,), angle), random, 256)
    turned = kornia.geometry.transform.rotate(tilted, torch.tensor([20.0]))
    other = kornia.geometry.transform.rotate(tilted, torch.tensor([-20.0]))
    middle = slice(64, 192)

    def across(picture: torch.Tensor) -> float:
        part = picture[0, 0, middle, middle]
        return float(part.diff(dim=0).abs().mean() / part.diff(dim=1).abs().mean())

    assert min(across(turned), across(other)) < 0.8 * max(across(turned), across(other))


@pytest.mark.parametrize("size", [16, 40, 64, 224])
def test_rain_is_in_range_at_every_size(size: int) -> None:
    random = torch.rand(3, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    streaks = rain_field(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([-0.4, 0.0, 0.4]), random, size)
    assert streaks.shape == (3, 1, size, size) and streaks.isfinite().all()
    assert streaks.min() >= 0 and streaks.max() <= 1 and not streaks[0].any()


def test_fields_of_a_large_view_are_those_of_a_small_one_enlarged() -> None:
    p = draw(AugmentConfig(**(OFF | {"fog_p": 1.0, "shadow_p": 1.0})), 0, 0, np.arange(4))
    small, large = fields(p, 64)[0], fields(p, 256)[0]
    assert (F.adaptive_avg_pool2d(large, 64) - small).abs().mean() < 0.01


# ---------------------------------------------------------------------------------------------------- noise


def test_the_same_view_gets_the_same_noise_wherever_it_is_worked_on() -> None:
    """Views first, first + 1, ... of a photo: in one piece or in several, alone or with others."""
    seed, std = np.array([11, 12], np.uint64), np.array([0.1, 0.2])
    whole = add_noise_(torch.zeros(2, 5, 3, 8, 8), std, seed)
    pieces = [add_noise_(torch.zeros(2, n, 3, 8, 8), std, seed, first) for first, n in ((0, 2), (2, 3))]
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(add_noise_(torch.zeros(1, 5, 3, 8, 8), std[1:], seed[1:]), whole[1:])


def test_noise_grows_with_its_strength_alone() -> None:
    seed = np.array([3], np.uint64)
    one, three = (add_noise_(torch.zeros(1, 1, 3, 16, 16), np.array([s]), seed) for s in (0.1, 0.3))
    torch.testing.assert_close(three, 3 * one)
    assert not add_noise_(torch.zeros(1, 1, 3, 16, 16), np.zeros(1), seed).any()


def test_places_in_the_bank_and_signs_are_spread() -> None:
    place, sign = noise_windows(draw(AugmentConfig(), 0, 0, np.arange(3000)).noise_seed, 2)
    assert place.min() >= 0 and place.max() < 4096 and len(np.unique(place)) > 2500
    assert set(np.unique(sign)) == {-1.0, 1.0} and abs(sign.mean()) < 0.05
    assert (place[:, 0] == place[:, 1]).mean() < 0.01, "views of a photo would share their noise"
