"""The deterministic augmentations against torchvision and kornia, and what holds for all of them."""

import kornia
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from roadwork.errors import UserError
from roadwork.inference.transforms import KINDS, Transform, gaussian_blur, transforms


def photo(batch: int = 2, count: int = 3, side: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    low = torch.rand(batch * count, 3, 6, 6)
    views = torch.nn.functional.interpolate(low, size=side, mode="bilinear").view(batch, count, 3, side, side)
    mask = torch.ones(batch, count, dtype=torch.bool)
    mask[1, 2] = False
    return views, mask


def test_first_is_the_photo_itself_and_a_short_list_begins_a_long_one():
    views, mask = photo()
    assert transforms(1, 0)[0](views, mask) is views
    assert transforms(16, 3)[:4] == transforms(4, 3)
    assert transforms(16, 3) != transforms(16, 4)
    assert len(set(transforms(1 + len(KINDS), 0))) == 16


@pytest.mark.parametrize("number", [0, 17])
def test_lists_that_do_not_exist_are_refused(number):
    with pytest.raises(UserError, match=f"num_augmentations is {number}; give 1 .* to 16"):
        transforms(number, 0)


@pytest.mark.parametrize("number", range(1, 16))
def test_each_changes_the_photo_mildly_and_keeps_its_range(number):
    views, mask = photo()
    changed = transforms(16, 0)[number](views, mask)
    assert changed.shape == views.shape
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert 1e-4 < float((changed - views).abs().mean()) < 0.25


def test_flip_rotation_and_zoom_are_torchvisions():
    views, mask = photo()
    assert torch.equal(Transform(flip=True)(views, mask), views.flip(-1))
    turned = Transform(degrees=8.0)(views, mask)
    reference = tv.affine(
        views, angle=-8.0, translate=[0, 0], scale=1.0, shear=[0, 0], interpolation=tv.InterpolationMode.BILINEAR
    )
    inside = (..., slice(6, 18), slice(6, 18))
    assert torch.allclose(turned[inside], reference[inside], atol=1e-4)
    zoomed = Transform(zoom=1.1)(views, mask)
    reference = tv.affine(
        views, angle=0, translate=[0, 0], scale=1.1, shear=[0, 0], interpolation=tv.InterpolationMode.BILINEAR
    )
    assert torch.allclose(zoomed[inside], reference[inside], atol=1e-4)
    both = Transform(flip=True, degrees=8.0)(views, mask)
    assert torch.allclose(both, Transform(degrees=8.0)(views, mask).flip(-1), atol=1e-5)


def test_brightness_and_saturation_are_torchvisions():
    views, mask = photo()
    assert torch.allclose(Transform(brightness=1.1)(views, mask), tv.adjust_brightness(views, 1.1), atol=1e-6)
    reference = tv.adjust_saturation(views, 0.9)
    assert torch.allclose(Transform(saturation=0.9)(views, mask), reference, atol=1e-3)


def test_contrast_turns_around_the_mean_of_the_whole_photo_without_padding():
    views, mask = photo()
    changed = Transform(contrast=1.1)(views, mask)
    luma = torch.tensor([0.299, 0.587, 0.114])
    mean = torch.einsum("vchw,c->vhw", views[1, :2], luma).mean()
    assert torch.allclose(changed[1], (mean + 1.1 * (views[1] - mean)).clamp(0, 1), atol=1e-5)


def test_hue_keeps_grey_and_luma():
    matrix = Transform(hue=10.0).colour_matrix()
    assert torch.allclose(matrix @ torch.ones(3), torch.ones(3), atol=1e-5)
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(luma @ matrix, luma, atol=1e-4)
    back = Transform(hue=-10.0).colour_matrix()
    assert torch.allclose(matrix @ back, torch.eye(3), atol=1e-4)


def test_blur_is_kornias():
    views, _ = photo(side=32)
    flat = views.flatten(0, 1)
    reference = kornia.filters.gaussian_blur2d(flat, (7, 7), (1.0, 1.0), border_type="reflect")
    assert torch.allclose(gaussian_blur(views, 1.0).flatten(0, 1), reference, atol=1e-5)
