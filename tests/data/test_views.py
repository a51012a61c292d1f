import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.views import compose_sheet, make_mask_views, make_views, mask_size, split_sheet, view_boxes
from roadwork.errors import UserError

SIDES = st.integers(1, 5000)


@pytest.mark.parametrize("shape", [(4032, 3024), (1920, 1080), (1280, 720), (3024, 4032), (720, 1280)])
@pytest.mark.parametrize("view_size", [64, 224, 512])
def test_street_photos_give_twelve_views(shape: tuple[int, int], view_size: int) -> None:
    assert len(view_boxes(*shape, view_size)) == 12


@pytest.mark.parametrize("view_size", [64, 224, 512])
def test_the_services_small_photo_is_one_view(view_size: int) -> None:
    assert view_boxes(224, 224, view_size).tolist() == [[0, 0, 224, 224]]


def test_small_photos_give_fewer_views() -> None:
    counts = [len(view_boxes(w, h, 512)) for w, h in ((320, 240), (640, 480), (1280, 720))]
    assert counts == sorted(counts) and counts[0] == 1 and counts[1] < 12


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.integers(1, 40).map(lambda k: 16 * k), st.integers(1, 12))
def test_views_stay_inside_and_cover(width: int, height: int, view_size: int, max_views: int) -> None:
    boxes = view_boxes(width, height, view_size, max_views)
    assert 1 <= len(boxes) <= max_views and boxes.dtype == np.float32
    assert boxes[0].tolist() == [0, 0, width, height]
    assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes == np.rint(boxes)).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    # Squares, and tiles, each cover the photo by themselves.
    for side in np.unique(boxes[1:, 2] - boxes[1:, 0]):
        level = boxes[1:][boxes[1:, 2] - boxes[1:, 0] == side].astype(int)
        if side == min(width, height) and max(width, height) > side * (max_views - 1):
            continue  # a ribbon longer than all the squares that are allowed: only view 0 covers it
        grid = np.zeros((height, width), dtype=bool)
        for x0, y0, x1, y1 in level:
            grid[y0:y1, x0:x1] = True
        assert grid.all()


@pytest.mark.parametrize("view_size", [518, 0, 15, 500])
def test_a_view_size_off_the_patch_is_refused(view_size: int) -> None:
    with pytest.raises(UserError, match=f"view size {view_size} is not a multiple of 16"):
        view_boxes(1280, 720, view_size)


def test_518_names_the_sizes_that_work() -> None:
    with pytest.raises(UserError, match="use 512 or 528"):
        mask_size(518)


def test_views_show_their_box() -> None:
    height, width = 360, 640
    y, x = np.mgrid[0:height, 0:width]
    photo = np.stack([x * 255 / width, y * 255 / height, 0 * x], axis=-1).astype(np.uint8)
    boxes = view_boxes(width, height, 64)
    views = make_views(photo, boxes, 64)
    assert views.shape == (12, 64, 64, 3)
    for view, (x0, y0, x1, y1) in zip(views.astype(float), boxes, strict=True):
        assert abs(view[..., 0].mean() - (x0 + x1) / 2 * 255 / width) < 1.5
        assert abs(view[..., 1].mean() - (y0 + y1) / 2 * 255 / height) < 1.5
        assert abs(view[0, 0, 0] - x0 * 255 / width) < 4 and abs(view[-1, -1, 1] - y1 * 255 / height) < 4


def test_shrinking_averages_so_that_thin_stripes_do_not_alias() -> None:
    photo = np.zeros((512, 512, 3), dtype=np.uint8)
    photo[:, ::2] = 255
    view = make_views(photo, np.asarray([[0, 0, 512, 512]], dtype=np.float32), 64)[0]
    assert view.min() >= 126 and view.max() <= 129


def test_the_longer_side_of_a_panorama_is_averaged_too() -> None:
    """The shorter side does not shrink, the longer one sixteenfold: no column may be left out."""
    stripes = np.zeros((64, 1024, 3), dtype=np.uint8)
    stripes[:, ::4] = 255
    whole = make_views(stripes, np.array([[0, 0, 1024, 64]], dtype=np.float32), 64)[0]
    assert np.abs(whole.astype(int) - 64).max() <= 4


def test_a_box_outside_the_photo_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the photo"):
        make_views(np.zeros((20, 20, 3), np.uint8), np.asarray([[0, 0, 21, 20]], np.float32), 16)


def test_mask_views_follow_the_views() -> None:
    bits = np.zeros((720, 1280), dtype=np.uint8)
    bits[:, :640] |= 1 << 1
    bits[360:, :] |= 1 << 5
    boxes = view_boxes(1280, 720, 64)
    masks = make_mask_views(bits, boxes, 64)
    assert masks.shape == (12, 16, 16)
    for k, inside in ((1, bits >> 1 & 1), (5, bits >> 5 & 1)):
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            share = inside[y0:y1, x0:x1].mean()
            assert abs((mask >> k & 1).mean() - share) <= 1 / 16
    assert not (masks & 0b011101).any()


@given(st.integers(1, 12))
def test_a_sheet_splits_into_its_views(num_views: int) -> None:
    views = np.random.default_rng(0).integers(0, 256, (num_views, 16, 16, 3), dtype=np.uint8)
    sheet = compose_sheet(views)
    assert sheet.shape == (num_views * 16, 16, 3)
    assert (split_sheet(sheet, num_views, 16) == views).all()
    with pytest.raises(ValueError, match="a sheet of"):
        split_sheet(sheet[:-1], num_views, 16)
