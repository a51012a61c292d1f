"""The canvas on which objects are united, for photos and crops of any size, and the sheet that a person looks at."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.mask_files import PhotoMasks
from roadwork.labelling.backend import WORK_SIDE, Canvas, Limits
from roadwork.labelling.crops import whole_photo
from roadwork.labelling.quality import suspicious
from roadwork.labelling.sheet import BAR, CELL, COLOURS, COLUMNS, contact_sheet, overlay

ANY = Limits(min_object_size=1)


@settings(max_examples=100)
@given(st.integers(1, 9000), st.integers(1, 9000), st.data())
def test_every_box_has_a_window_inside_the_canvas(width: int, height: int, data: st.DataObject) -> None:
    canvas = Canvas(width, height, ANY)
    rows, columns = canvas.bits.shape
    assert 1 <= rows <= WORK_SIDE and 1 <= columns <= WORK_SIDE
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    top, left, bottom, right = canvas.window((x0, y0, x1, y1))
    assert 0 <= top < bottom <= rows and 0 <= left < right <= columns
    assert canvas.window((0, 0, width, height)) == (0, 0, rows, columns)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_a_photo_without_pixels_has_no_canvas(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        Canvas(width, height, ANY)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1), st.integers(0, 2**16 - 1)), max_size=12))
def test_a_union_is_the_same_in_any_order(objects: list[tuple[int, float, int]]) -> None:
    def made(order: list[tuple[int, float, int]]) -> PhotoMasks:
        canvas = Canvas(4, 4, ANY)
        for class_index, score, pixels in order:
            mask = (pixels >> np.arange(16) & 1).astype(bool).reshape(4, 4)
            assert canvas.add(class_index, (0, 0, 4, 4), mask, score) == bool(pixels)
        return canvas.masks("hand")

    one, other = made(objects), made(objects[::-1])
    assert np.array_equal(one.bits, other.bits)
    assert (one.confidence, one.objects) == (other.confidence, other.objects)
    for k in range(6):
        there = [(score, pixels) for c, score, pixels in objects if c == k and pixels]
        assert one.objects[k] == len(there) and one.confidence[k] == max((score for score, _ in there), default=0.0)
        assert bool((one.bits >> k & 1).any()) == bool(there)


def test_a_mask_of_another_size_than_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of shape \(3, 4\) for a window of \(4, 4\)"):
        Canvas(4, 4, ANY).add(0, (0, 0, 4, 4), np.ones((3, 4), bool), 1.0)


def test_scores_above_one_are_cut_and_invalid_classes_have_none() -> None:
    canvas = Canvas(4, 4, ANY)
    for k in (0, 1):
        canvas.add(k, (0, 0, 4, 4), np.ones((4, 4), bool), 1.5)
    made = canvas.masks("hand", valid=(True, False, True, True, True, True), real=True)
    assert made.confidence[:2] == (1.0, 0.0) and made.objects[:2] == (1, 0) and made.real
    assert set(np.unique(made.bits)) == {1}


# -------------------------------------------------------------------------------------------------- the sheet


def masks(bits: np.ndarray, objects: int = 1) -> PhotoMasks:
    count = tuple(objects if (bits >> k & 1).any() else 0 for k in range(6))
    return PhotoMasks(bits, (True,) * 6, (0.0,) * 6, "hand", bits.shape[1], bits.shape[0], count)


@pytest.mark.parametrize("k", range(6))
def test_a_class_is_shown_in_its_colour(k: int) -> None:
    rgb = np.zeros((4, 4, 3), np.uint8)
    bits = np.zeros((4, 4), np.uint8)
    bits[0, 0] = 1 << k
    painted = overlay(rgb, bits, strength=1.0)
    assert painted[0, 0].tolist() == COLOURS[k].tolist() and not painted[1:].any()
    assert np.array_equal(overlay(rgb + 90, np.zeros_like(bits)), rgb + 90)


def test_a_pixel_of_two_classes_mixes_them() -> None:
    painted = overlay(np.zeros((1, 1, 3), np.uint8), np.array([[0b11]], np.uint8), strength=1.0)
    expected = (COLOURS[0].astype(float) + COLOURS[1]) / 2
    np.testing.assert_allclose(painted[0, 0], expected, atol=1)


@pytest.mark.parametrize("number", [1, COLUMNS, COLUMNS + 1])
def test_a_sheet_has_a_cell_for_each_photo_of_any_shape(number: int) -> None:
    shapes = [(60, 90), (400, 30), (30, 700), (1, 1), (720, 1280)]
    pictures = []
    for i in range(number):
        height, width = shapes[i % len(shapes)]
        rgb = np.full((height, width, 3), 60, np.uint8)
        pictures.append((whole_photo("東京/1" if i else "a", rgb), masks(np.ones((height, width), np.uint8))))
    sheet = cv2.imdecode(np.frombuffer(contact_sheet(pictures), np.uint8), cv2.IMREAD_COLOR)
    assert sheet is not None
    rows = -(-number // COLUMNS)
    assert sheet.shape == (BAR + rows * (CELL[1] + BAR), COLUMNS * CELL[0], 3)


def test_photos_of_no_roadwork_that_are_full_of_it_come_most_first() -> None:
    full, few = np.ones((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    few[0, 0] = 2
    photos = {
        "b": (0, masks(full, 5)), "a": (0, masks(full, 5)), "most": (0, masks(full | 2, 9)), "few": (0, masks(few, 2)),
        "roadwork": (1, masks(full, 50)), "unknown": (None, masks(full, 50)),
    }  # fmt: skip
    listed = suspicious(photos)
    assert [(line["id"], line["count"]) for line in listed] == [("most", 18), ("a", 5), ("b", 5)]
    assert listed[0]["objects"]["barrier"] == 9
