"""Each op against its counterpart in kornia, torchvision or Pillow; the largest error is stated with each."""

import io
import math

import kornia
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from roadwork.data import augment_blur, augment_colour, augment_noise
from roadwork.data.augment import colour, gaussian_blur, motion_blur, warp
from roadwork.data.augment_blur import motion_steps
from roadwork.data.augment_challenge import jpeg, quantisation
from roadwork.data.augment_colour import LUMA, colour_matrices, hue_matrices, mean_grey, saturation_matrices
from roadwork.data.augment_geometry import flips, from_corners, resize, rotations, zooms


def picture(n: int = 2, size: int = 64, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Smooth coloured blobs: interpolation differs by rounding only where there is no hard edge."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 9, 9, generator=g)
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return fine.clamp(0, 1) * (high - low) + low


def as_matrix(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_flip_is_exact():
    x = picture()
    assert error(warp(x, as_matrix(flips(np.array([True, False])))), torch.stack([x[0].flip(-1), x[1]])) < 1e-5


@pytest.mark.parametrize("degrees", [-15.0, 3.0, 90.0])
def test_rotation_is_torchvisions(degrees):
    x = picture()
    theirs = TF.rotate(x, degrees, interpolation=TF.InterpolationMode.BILINEAR)
    ours = warp(x, as_matrix(rotations(np.radians([degrees] * 2))))
    # torchvision rounds its fill at the outermost pixels
    assert error(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2]) < 1e-4


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_zoom_is_torchvisions_affine(factor):
    x = picture()
    theirs = TF.affine(x, 0.0, [0, 0], factor, [0.0, 0.0], interpolation=TF.InterpolationMode.BILINEAR)
    assert error(warp(x, as_matrix(zooms(np.array([factor] * 2)))), theirs) < 1e-4


def test_perspective_is_kornias():
    x = picture()
    size = x.shape[-1]
    shift = np.random.default_rng(0).uniform(-0.15, 0.15, (2, 4, 2))
    matrix = from_corners(shift)
    to_pixels = np.array([[size / 2, 0, (size - 1) / 2], [0, size / 2, (size - 1) / 2], [0, 0, 1]])
    forward = to_pixels @ np.linalg.inv(matrix) @ np.linalg.inv(to_pixels)
    theirs = kornia.geometry.transform.warp_perspective(x, as_matrix(forward), (size, size))
    assert error(warp(x, as_matrix(matrix)), theirs) < 2e-4


def test_corners_go_where_they_are_told():
    shift = np.random.default_rng(1).uniform(-0.2, 0.2, (3, 4, 2))
    corner = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], float)
    place = np.einsum("nij,kj->nki", from_corners(shift), corner)
    np.testing.assert_allclose(place[..., :2] / place[..., 2:], corner[None, :, :2] + shift, atol=1e-12)


def test_one_warp_is_the_ops_one_after_the_other():
    x = picture(1, 96)
    parts = [flips(np.array([True])), rotations(np.array([0.2])), zooms(np.array([1.2]))]
    one = warp(x, as_matrix(parts[0] @ parts[1] @ parts[2]))
    steps = x
    for part in parts:
        steps = warp(steps, as_matrix(part))
    inside = slice(20, -20)
    assert error(one[..., inside, inside], steps[..., inside, inside]) < 0.02  # three blurs instead of one


def linear(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, x=None) -> torch.Tensor:
    arrays = [np.array([v, v]) for v in (brightness, contrast, saturation, hue)]
    matrix = as_matrix(colour_matrices(*arrays))
    shift = (1 - contrast) * brightness * mean_grey(x)
    return colour(x, torch.cat([matrix, shift[:, None, None].expand(-1, 3, 1)], 2))


def test_brightness_contrast_saturation_are_torchvisions():
    x = picture(low=0.3, high=0.7)  # no value leaves [0, 1], since torchvision clamps between ops
    assert error(linear(brightness=1.3, x=x), TF.adjust_brightness(x, 1.3)) < 2e-6
    assert error(linear(contrast=0.7, x=x), TF.adjust_contrast(x, 0.7)) < 1e-4
    assert error(linear(saturation=1.2, x=x), TF.adjust_saturation(x, 1.2)) < 1e-4
    together = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x, 1.2), 0.8), 0.8)
    assert error(linear(1.2, 0.8, 0.8, x=x), together) < 2e-4
    kornias = kornia.enhance.adjust_contrast_with_mean_subtraction(x, 0.7)
    assert error(linear(contrast=0.7, x=x), kornias) < 1e-4


def test_hue_is_near_torchvisions_for_small_angles_and_keeps_grey_and_luma():
    x = picture(low=0.3, high=0.7)
    # a turn in YIQ is not one in HSV (0.12 at worst, 0.03 on average, on colours this strong), but goes the same way
    ours, theirs = linear(hue=math.radians(15), x=x), TF.adjust_hue(x, 15 / 360)
    assert error(ours, theirs) < 0.13 and (ours - theirs).abs().mean().item() < 0.04
    turned = (kornia.color.rgb_to_hsv(ours) - kornia.color.rgb_to_hsv(x))[:, 0]
    turned = torch.remainder(turned + math.pi, 2 * math.pi) - math.pi
    assert 10 < math.degrees(turned.mean().item()) < 20
    matrix = hue_matrices(np.radians([40.0]))[0]
    np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-6)
    np.testing.assert_allclose(np.array(LUMA) @ matrix, LUMA, atol=1e-6)
    np.testing.assert_allclose(saturation_matrices(np.array([0.0]))[0], np.tile(LUMA, (3, 1)))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_gaussian_blur_is_torchvisions_and_kornias(sigma):
    x = picture()
    taps = 2 * math.ceil(3 * sigma) + 1
    assert error(gaussian_blur(x, sigma), TF.gaussian_blur(x, [taps, taps], [sigma, sigma])) < 1e-5
    kornias = kornia.filters.gaussian_blur2d(x, (taps, taps), (sigma, sigma))
    assert error(gaussian_blur(x, torch.tensor([sigma, sigma])), kornias) < 1e-5


def test_gaussian_blur_of_each_view_is_its_own():
    x = picture()
    both = gaussian_blur(x, torch.tensor([0.5, 2.0]))
    assert torch.equal(both[:1], gaussian_blur(x[:1], 0.5)) and torch.equal(both[1:], gaussian_blur(x[1:], 2.0))
    assert torch.equal(gaussian_blur(x, 0.0), x)
    with pytest.raises(ValueError, match="sigma"):
        gaussian_blur(x, -1.0)


@pytest.mark.parametrize(("length", "degrees"), [(15, 0.0), (7, 90.0), (9, 45.0)])
def test_motion_blur_is_near_kornias(length, degrees):
    x = picture()
    theirs = kornia.filters.motion_blur(x, length, degrees, 0.0, border_type="replicate")
    # kornia's kernel has `length` taps on a line of length - 1 px; turned, it is interpolated, and longer by rounding
    reach = length - 1
    vector = np.array([reach * math.cos(math.radians(degrees)), reach * math.sin(math.radians(-degrees))])
    assert error(motion_blur(x, vector), theirs) < 0.03


@pytest.mark.parametrize("vector", [(14.0, 0.0), (0.0, 6.0), (5.0, -9.0), (-3.0, 3.0), (0.5, 0.2)])
def test_motion_blur_keeps_size_brightness_and_centre(vector):
    dot = torch.zeros(1, 1, 65, 65)
    dot[..., 32, 32] = 1
    out = motion_blur(dot, np.array(vector))[0, 0]
    place = torch.arange(65.0) - 32
    assert out.shape == (65, 65) and out.sum().item() == pytest.approx(1, abs=1e-5)
    assert abs((out.sum(0) * place).sum().item()) <= 0.5 and abs((out.sum(1) * place).sum().item()) <= 0.5
    spread = [math.sqrt((out.sum(axis) * place**2).sum().item() * 12) for axis in (0, 1)]
    assert spread == pytest.approx([abs(v) for v in vector], abs=2.0)
    if motion_steps(np.array(vector)) and all(vector):
        along = (out * place[:, None] * place[None]).sum().item()
        assert math.copysign(1, along) == math.copysign(1, vector[0] * vector[1])


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_is_pillows(quality):
    x = picture(1, 96)
    array = (x[0].permute(1, 2, 0) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    theirs = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255
    ours = jpeg(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255, quality)[0]
    # on average under one level of 255, where JPEG itself changes these colours by 1.6 to 4
    assert (ours - theirs).abs().mean().item() * 255 < 1.1 and error(ours, theirs) * 255 < 26
    pillow = Image.open(buffer).quantization
    # Pillow lists coefficients in natural order
    np.testing.assert_array_equal(quantisation(quality).reshape(2, 64), [list(pillow[0]), list(pillow[1])])


def test_jpeg_pads_odd_sizes():
    x = picture(1, 64)[..., :50, :37]
    assert jpeg(x).shape == x.shape and error(jpeg(x, 95), x) < 0.1


def test_the_forms_for_a_gpu_are_the_forms_for_a_cpu():
    x = picture(3)
    sigma = np.array([0.5, 0.0, 2.0])
    assert error(augment_blur._by_convolution(x, augment_blur.gaussian_weights(sigma)), gaussian_blur(x, sigma)) < 1e-6
    matrix = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(2))
    assert error(augment_colour._by_columns(x, matrix), colour(x, matrix)) < 1e-6
    photos, std, seed = x[:, None].repeat(1, 2, 1, 1, 1), np.array([0.1, 0.2, 0.3]), np.arange(3, dtype=np.uint64)
    place, sign = augment_noise.noise_windows(seed, 2)
    bank = augment_noise._bank(photos[0, 0].numel(), photos.device)
    rows = augment_noise._by_rows(photos.clone(), bank, place, sign * std[:, None])
    assert error(rows, augment_noise.add_noise_(photos.clone(), std, seed)) < 1e-6


@pytest.mark.parametrize(("length", "size"), [(224, 512), (224, 518), (224, 112), (224, 74), (74, 224), (5, 5), (7, 1)])
def test_resize_is_torchs_bilinear_on_any_number_of_threads(length: int, size: int) -> None:
    x = torch.rand(2, 3, length, length, generator=torch.Generator().manual_seed(0))

    def theirs(views: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(views, size=(size, size), mode="bilinear", align_corners=False)

    exact = theirs(x.double())
    assert error(resize(x.double(), size), exact) < 1e-13 and error(resize(x, size).double(), exact) < 3e-7
    assert error(resize(x, size), theirs(x)) < 3e-5, "torch rounds places to fp32"
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(resize(x, size))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[N, 3, 3\]"):
        warp(picture(), torch.eye(3))
    with pytest.raises(ValueError, match=r"\[N, 3, 4\]"):
        colour(picture(), torch.eye(3)[None])
