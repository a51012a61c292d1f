"""The challenge's distribution as an augmentation: the same severities as the scored replica, on tensors."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import dctn

from roadwork.config import AugmentConfig
from roadwork.data import augment_challenge
from roadwork.data.augment_challenge import challenge, jpeg, quantisation
from roadwork.data.augment_geometry import flips, from_corners, rotations, sampling_grid, warp, zooms
from roadwork.data.augment_parameters import CHALLENGE_SIDE, Parameters, draw
from roadwork.evaluation import challenge as scored


def plain(n: int = 1) -> Parameters:
    """Photos of the challenge to which nothing but the resizing and the JPEG happens."""
    p = draw(AugmentConfig(challenge_p=1.0), 0, 0, np.arange(n))
    none = np.zeros(n)
    return dataclasses.replace(p, resample=np.ones(n, np.int64), noise=none, gaussian=none)


def smooth(n: int = 1, size: int = 64) -> torch.Tensor:
    coarse = torch.rand(n, 3, 7, 7, generator=torch.Generator().manual_seed(5))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)[:, None]


def test_the_severities_are_those_that_are_scored() -> None:
    """Training and scoring are written apart; what they draw from must be one distribution."""
    p = draw(AugmentConfig(challenge_p=1.0), 3, 0, np.arange(30_000))
    assert CHALLENGE_SIDE == scored.SIZE
    assert set(np.unique(p.resample)) == set(scored.RESAMPLING)
    # noise is added to a studio-range picture: 255 / 219 of it in full range
    expected = np.sqrt(scored.NOISE_VARIANCE) * 255 / 219
    np.testing.assert_allclose(np.unique(p.noise), expected)
    np.testing.assert_allclose(np.unique(p.gaussian), [k / 6 for k in scored.BLUR_KERNEL])
    grey = np.unique(np.round(p.matrix.sum(axis=2)[:, 0], 6))  # a grey pixel is dimmed by the sum of a row
    np.testing.assert_allclose(grey, sorted(scored.DIMMING), atol=1e-6)
    area = np.linalg.det(p.homography[p.warp][:, :2, :2])
    assert area.min() >= scored.CROP_AREA[0] - 1e-9 and area.max() <= scored.CROP_AREA[1] + 1e-9
    turn = np.degrees(np.arctan2(p.homography[p.warp][:, 1, 0], p.homography[p.warp][:, 0, 0]))
    assert np.abs(turn).max() <= scored.ROTATION_DEGREES + 1e-9 and np.abs(turn).max() > 19


def test_chroma_of_each_severity_is_the_scored_one() -> None:
    p = draw(AugmentConfig(challenge_p=1.0), 3, 0, np.arange(30_000))
    red = np.array([1.0, 0.0, 0.0])
    seen = {tuple(np.round(matrix @ red, 3)) for matrix in p.matrix}
    photo = np.zeros((4, 4, 3), np.uint8)
    photo[..., 0] = 255
    for saturation in scored.SATURATION:
        for dimming in scored.DIMMING:
            theirs = scored.dimmed(scored.desaturated(photo, saturation), dimming)[0, 0] / 255
            assert min(np.abs(np.array(one) - theirs).max() for one in seen) < 0.01, (saturation, dimming)


@pytest.mark.parametrize("size", [64, CHALLENGE_SIDE])
def test_an_untouched_photo_only_goes_through_jpeg(size: int) -> None:
    photo = smooth(2, size)
    assert torch.equal(challenge(photo, plain(2)), jpeg(photo[:, 0])[:, None])


def test_a_large_view_keeps_no_detail_beyond_what_the_service_sends() -> None:
    size = 2 * CHALLENGE_SIDE
    checks = (torch.arange(size)[:, None] + torch.arange(size)[None]) % 2
    photo = checks.float().expand(1, 1, 3, size, size).contiguous()
    out = challenge(photo, plain())
    assert out.shape == photo.shape and out.std() < 0.02
    assert out.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("factor", [2, 3])
def test_resampling_is_the_scored_one(factor: int) -> None:
    photo = smooth(1, 96)
    ours = augment_challenge._distort(photo[:, 0], dataclasses.replace(plain(), resample=np.array([factor])), 0)
    array = (photo[0, 0].permute(1, 2, 0) * 255).round().byte().numpy()
    theirs = torch.from_numpy(scored.resampled(array, factor)).permute(2, 0, 1).float() / 255
    # one of them rounds to bytes in between; borders differ by the half pixel that the division leaves over
    assert (ours[0] - theirs).abs().mean() < 0.004
    assert (ours[0] - theirs)[:, 4:-4, 4:-4].abs().max() < 0.02


@pytest.mark.parametrize("kernel", [7, 9])
def test_blur_is_the_scored_one(kernel: int) -> None:
    photo = smooth(1, CHALLENGE_SIDE)
    ours = augment_challenge._distort(photo[:, 0], dataclasses.replace(plain(), gaussian=np.array([kernel / 6])), 0)
    array = (photo[0, 0].permute(1, 2, 0) * 255).round().byte().numpy()
    theirs = torch.from_numpy(scored.blurred(array, kernel)).permute(2, 0, 1).float() / 255
    assert (ours[0] - theirs).abs().max() < 0.012


@pytest.mark.parametrize("variance", [0.001, 0.002])
def test_noise_has_the_scored_strength_in_brightness_and_colour(variance: float) -> None:
    grey = torch.full((1, 3, CHALLENGE_SIDE, CHALLENGE_SIDE), 0.5)
    p = dataclasses.replace(plain(), noise=np.sqrt([variance]) * 255 / 219)
    ours = (augment_challenge._distort(grey, p, 0) - 0.5)[0].flatten(1).numpy()
    photo = np.full((CHALLENGE_SIDE, CHALLENGE_SIDE, 3), 128, np.uint8)
    added = scored.noisy(photo, variance, np.random.default_rng(0)).astype(float) - 128
    theirs = added.reshape(-1, 3).T / 255
    luma = np.array([0.299, 0.587, 0.114])
    assert (luma @ ours).std() == pytest.approx((luma @ theirs).std(), rel=0.08)
    np.testing.assert_allclose(ours.std(axis=1), theirs.std(axis=1), rtol=0.08)
    np.testing.assert_allclose(np.corrcoef(ours), np.corrcoef(theirs), atol=0.05)


# ----------------------------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 99, 100])
def test_tables_are_libjpegs_at_every_quality(quality: int) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG", quality=quality)
    theirs = Image.open(stream).quantization  # type: ignore[attr-defined]
    np.testing.assert_array_equal(quantisation(quality).reshape(2, 64), [list(theirs[0]), list(theirs[1])])


@pytest.mark.parametrize("quality", [0, -3, 101])
def test_a_quality_that_does_not_exist_is_refused(quality: int) -> None:
    with pytest.raises(ValueError, match="give 1 to 100"):
        quantisation(quality)


def test_blocks_are_transformed_as_scipy_does() -> None:
    cosine = augment_challenge._cosines()
    block = np.random.default_rng(0).normal(size=(8, 8))
    np.testing.assert_allclose(cosine @ block @ cosine.T, dctn(block, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(cosine @ cosine.T, np.eye(8), atol=1e-12)


def test_a_flat_picture_passes_jpeg_to_a_level_and_a_better_quality_costs_less() -> None:
    flat = torch.tensor([0.2, 0.5, 0.7]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert (jpeg(flat) - flat).abs().max() < 2.5 / 255
    photo = smooth(1, 64)[:, 0]
    loss = [float((jpeg(photo, quality) - photo).abs().mean()) for quality in (5, 25, 75, 95)]
    assert loss == sorted(loss, reverse=True) and loss[-1] < 0.012


def test_a_second_jpeg_costs_less_than_the_first() -> None:
    photo = smooth(1, 64)[:, 0]
    once = jpeg(photo)
    assert (jpeg(once) - once).abs().mean() < 0.8 * (once - photo).abs().mean()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (1, 1), (40, 8)])
def test_jpeg_of_any_size_keeps_it(height: int, width: int) -> None:
    picture = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    out = jpeg(picture)
    assert out.shape == picture.shape and out.isfinite().all() and out.min() >= 0 and out.max() <= 1


def test_jpeg_has_no_gradient_and_leaves_its_input_alone() -> None:
    picture = torch.rand(1, 3, 16, 16, requires_grad=True)
    before = picture.detach().clone()
    assert not jpeg(picture).requires_grad
    assert torch.equal(picture.detach(), before)


# ------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    "matrices",
    [flips(np.array([False])), rotations(np.zeros(1)), zooms(np.ones(1)), from_corners(np.zeros((1, 4, 2)))],
)
def test_ops_at_strength_zero_are_the_identity(matrices: np.ndarray) -> None:
    np.testing.assert_array_equal(matrices, np.eye(3)[None])
    picture = smooth(1, 40)[:, 0]
    torch.testing.assert_close(warp(picture, torch.from_numpy(matrices).float()), picture, atol=1e-5, rtol=0)


def test_matrices_undo_each_other() -> None:
    angle, factor = np.array([0.3, -1.1]), np.array([1.3, 0.7])
    np.testing.assert_allclose(rotations(angle) @ rotations(-angle), np.eye(3)[None].repeat(2, 0), atol=1e-12)
    np.testing.assert_allclose(zooms(factor) @ zooms(1 / factor), np.eye(3)[None].repeat(2, 0), atol=1e-12)
    mirror = flips(np.array([True]))
    np.testing.assert_allclose(mirror @ mirror, np.eye(3)[None])


def test_a_zoom_about_a_place_brings_it_to_the_middle() -> None:
    picture = torch.zeros(1, 1, 65, 65)
    picture[..., 16, 48] = 1.0
    place = np.array([[(48 + 0.5) / 65 * 2 - 1, (16 + 0.5) / 65 * 2 - 1]])
    out = warp(picture, torch.from_numpy(zooms(np.array([2.0]), place)).float())[0, 0]
    assert divmod(int(out.argmax()), 65) == (32, 32)


def test_nothing_is_seen_behind_the_camera_or_outside() -> None:
    tilted = torch.eye(3)[None].clone()
    tilted[0, 2, 0] = 3.0  # depth 1 + 3 x: negative on the left
    grid = sampling_grid(tilted, 8, 8)
    assert grid.isfinite().all()
    assert grid[0, :, 0].abs().max() > 1e3, "points behind the camera must be far outside"
    far = warp(torch.ones(1, 1, 16, 16), torch.from_numpy(zooms(np.array([0.25]))).float())
    assert far[0, 0, 0, 0] == 0 and far[0, 0, 8, 8] == 1
    assert math.isclose(float(far.mean()), 1 / 16, abs_tol=0.03)
