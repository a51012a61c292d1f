"""One photo to views: a smaller decode and masks box by box give what the plain way gives."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import simplejpeg

from roadwork.data.decode import decode_views, encode_views
from roadwork.data.encode import encode_photo, encode_sheet, mask_views, shrink_for
from roadwork.data.images import decode_photo
from roadwork.data.plan import BuildOptions, Entry
from roadwork.data.record import Record
from roadwork.data.views import compose_sheet, make_mask_views, make_views, scaled_boxes, view_boxes
from tests.data.photos import encode, scene


@pytest.mark.parametrize(
    ("width", "height", "factor"), [(1280, 720, 2), (1283, 721, 2), (2600, 1950, 4), (300, 200, 1)]
)
def test_views_of_a_smaller_decode_look_like_those_of_the_whole(width: int, height: int, factor: int) -> None:
    size = 128
    data = encode(scene(3, width, height))
    boxes = view_boxes(width, height, size)
    assert shrink_for(boxes, size) == factor
    entry = Entry((0, 0, 0), Record("1", label=1), "train", "g", "train-0")
    sample = encode_photo(entry, data, None, None, BuildOptions("x", "y", view_size=size)).sample
    assert isinstance(sample.views, bytes) and np.array_equal(sample.boxes, boxes)
    assert (sample.meta["width"], sample.meta["height"]) == (width, height)
    found = decode_views(sample.views, len(boxes), size).astype(int)
    plain = make_views(decode_photo(data)[0], boxes, size).astype(int)
    assert np.abs(found - plain).mean() < 4


@pytest.mark.parametrize(("size", "chroma"), [(128, "444"), (512, "420")])
def test_small_views_of_a_shard_keep_their_full_chroma(size: int, chroma: str) -> None:
    entry = Entry((0, 0, 0), Record("1", label=1), "train", "g", "train-0")
    options = BuildOptions("x", "y", view_size=size)
    data = encode(scene(3, 1280, 720))
    fine, coarse = (
        encode_photo(entry, data, None, None, replace(options, quality=quality)).sample.views for quality in (90, 30)
    )
    assert simplejpeg.decode_jpeg_header(fine)[3] == chroma
    assert len(coarse) < 0.7 * len(fine)


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1283, 721), (2200, 1650), (301, 97), (4001, 301)])
def test_views_cut_from_planes_are_those_of_the_photo(width: int, height: int) -> None:
    """Cut and encoded without RGB: as close to the views as the same JPEG of them is, in every channel and view."""
    rgb = cv2.resize(scene(5, width // 4, height // 4), (width, height), interpolation=cv2.INTER_CUBIC)
    boxes, options = view_boxes(width, height, 256), BuildOptions("x", "y", view_size=256)
    views = make_views(rgb, boxes, 256)
    sheet, first = encode_sheet(rgb, boxes, options)
    assert encode_sheet(rgb, boxes, options)[0] == sheet
    found, usual = (decode_views(data, len(boxes), 256) for data in (sheet, encode_views(compose_sheet(views))))
    off, usually_off = (np.abs(some - views.astype(float)).mean((1, 2)) for some in (found, usual))
    assert (off < usually_off + 0.75).all() and (off.mean(0) < 1.2 * usually_off.mean(0)).all()
    assert np.abs(first.astype(float) - cv2.cvtColor(views[0], cv2.COLOR_RGB2GRAY)).max() <= 2


def test_no_view_is_enlarged_for_speed() -> None:
    for width, height in [(4032, 3024), (1920, 1080), (640, 480), (97, 4000)]:
        for size in (64, 224, 512):
            boxes = view_boxes(width, height, size)
            side = (boxes[:, 2:] - boxes[:, :2]).min()
            assert shrink_for(boxes, size) == 1 or side / shrink_for(boxes, size) >= size


@pytest.mark.parametrize("quarter", [1, 4])
def test_masks_box_by_box_equal_masks_of_the_whole(quarter: int) -> None:
    rng = np.random.default_rng(0)
    bits = np.kron(rng.integers(0, 64, (18, 32)), np.ones((40 // quarter, 40 // quarter))).astype(np.uint8)
    bits[:, : bits.shape[1] // 2] = 0
    boxes = scaled_boxes(view_boxes(1280, 720, 64), (1280, 720), bits.shape)
    assert np.array_equal(mask_views(bits, boxes, 64), make_mask_views(bits, boxes, 64))


def test_scaled_boxes_stay_inside_and_are_never_empty() -> None:
    boxes = view_boxes(4000, 60, 512)
    scaled = scaled_boxes(boxes, (4000, 60), (4, 250))
    assert (scaled[:, :2] < scaled[:, 2:]).all() and scaled.min() >= 0
    assert (scaled[:, 2] <= 250).all() and (scaled[:, 3] <= 4).all()
