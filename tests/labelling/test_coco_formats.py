"""COCO's formats as strangers write them: every mask goes both ways, every damage is one ValueError, names are not guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from roadwork.errors import UserError
from roadwork.labelling.backend import Limits
from roadwork.labelling.crops import tile_boxes, tiled_photo, whole_photo
from roadwork.labelling.quality import _kappa, agreement, by_label, spread
from roadwork.labelling.real import CocoMasks, class_of, own_masks
from roadwork.labelling.rle import (
    MAX_PIXELS,
    decode_counts,
    decode_segmentation,
    decompress_counts,
)
from roadwork.labelling.weights import SAM_URLS, model_folder, sam_checkpoint
from tests.labelling.coco_writer import compress_counts, encode_counts

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


@settings(max_examples=150)
@given(masks)
def test_every_mask_survives_plain_and_compressed_runs(mask: np.ndarray) -> None:
    height, width = mask.shape
    counts = encode_counts(mask)
    assert sum(counts) == mask.size and all(count > 0 for count in counts[1:])
    for form in (counts, np.array(counts), compress_counts(counts), compress_counts(counts).encode()):
        read = decode_segmentation({"size": [height, width], "counts": form}, height, width)
        assert read.dtype == bool and np.array_equal(read, mask)


@settings(max_examples=150)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30))
def test_compressed_counts_of_any_size_go_both_ways(counts: list[int]) -> None:
    text = compress_counts(counts)
    assert decompress_counts(text) == counts
    assert all(48 <= ord(letter) < 112 for letter in text)


def test_masks_run_down_the_columns_and_begin_with_zeros() -> None:
    mask = np.array([[True, False, True], [True, False, False]])
    assert encode_counts(mask) == [0, 2, 2, 1, 1]
    assert encode_counts(~mask) == [2, 2, 1, 1] or encode_counts(~mask)[0] == 2
    assert encode_counts(np.zeros((2, 3), bool)) == [6] and encode_counts(np.ones((2, 3), bool)) == [0, 6]


@pytest.mark.parametrize(
    "segmentation",
    [
        None, 7, "text", b"text", True,
        {}, {"size": [2, 3]}, {"size": None, "counts": [6]}, {"size": [2], "counts": [6]},
        {"size": ["a", 3], "counts": [6]}, {"size": [3, 2], "counts": [6]},
        {"size": [2, 3], "counts": None}, {"size": [2, 3], "counts": 6}, {"size": [2, 3], "counts": [None, 6]},
        {"size": [2, 3], "counts": [[6]]}, {"size": [2, 3], "counts": [5]}, {"size": [2, 3], "counts": [7]},
        {"size": [2, 3], "counts": [-1, 7]}, {"size": [2, 3], "counts": [2**70]}, {"size": [2, 3], "counts": ["x"]},
        {"size": [2, 3], "counts": "\x00"}, {"size": [2, 3], "counts": "P"}, {"size": [2, 3], "counts": "ä"},
        {"size": [2, 3], "counts": {"a": 1}},
        [[0, 0, 1, 1]], [[0, 0, 1, 0, 1]], [[0, 0, 1, 0, 1, None]], [[0, 0, 1, 0, 1, float("nan")]], [None], [[[0, 1]]],
        [{"x": 1}], [["a"] * 6], [[0, 0, 1, 0, float("inf"), 1]],
    ],
)  # fmt: skip
def test_every_damage_is_the_one_error_that_callers_expect(segmentation: Any) -> None:
    """A file of 10,000 annotations with one null must name it, not end in a traceback."""
    with pytest.raises(ValueError, match="."):
        decode_segmentation(segmentation, 2, 3)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (MAX_PIXELS, 2), (-3, -3)])
def test_masks_of_no_size_or_of_an_absurd_one_are_refused_before_memory_is_taken(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to"):
        decode_segmentation({"size": [height, width], "counts": [height * width]}, height, width)


def test_counts_that_are_text_are_no_list() -> None:
    with pytest.raises(ValueError, match="RLE counts are str"):
        decode_counts("06", 2, 3)


def test_polygons_are_filled_and_united() -> None:
    square = [2, 2, 6, 2, 6, 6, 2, 6]
    one = decode_segmentation([square], 10, 10)
    assert one[3:6, 3:6].all() and not one[:2].any() and not one[7:].any()
    both = decode_segmentation([square, [v + 3 for v in square]], 10, 10)
    assert (both >= one).all() and both.sum() > one.sum()
    assert not decode_segmentation([], 10, 10).any()
    outside = decode_segmentation([[-5, -5, 30, -5, 30, 30, -5, 30]], 10, 10)
    assert outside.all()


# ------------------------------------------------------------------------------------------------- coco files


def coco(path: Path, images: list[tuple[Any, str]], marked: Any, **changes: Any) -> CocoMasks:
    """A file whose annotation covers the whole of image `marked`."""
    content = {
        "images": [{"id": i, "file_name": name, "width": 6, "height": 4} for i, name in images],
        "categories": [{"id": 1, "name": "Cone"}, {"id": 2, "name": "Road"}],
        "annotations": [{"image_id": marked, "category_id": 1, "segmentation": {"size": [4, 6], "counts": [0, 24]}}],
    }
    path.write_text(json.dumps(content | changes))
    return CocoMasks(str(path))


@pytest.mark.parametrize("photo_id", ["5", "train/street/five.jpg", "five.jpg", "five", "elsewhere/five.png"])
def test_a_photo_is_found_by_id_path_name_or_stem(tmp_path: Path, photo_id: str) -> None:
    file = coco(tmp_path / "a.json", [(5, "train/street/five.jpg"), (6, "six.jpg")], 5)
    assert file.find(photo_id) == 5


def test_an_id_counts_before_anothers_file_name(tmp_path: Path) -> None:
    """Image 3 is stored as 7.jpg and image 7 as 3.jpg: the number of a photo is its id."""
    file = coco(tmp_path / "a.json", [(3, "7.jpg"), (7, "3.jpg")], 3)
    assert file.find("3") == 3 and file.find("7") == 7
    assert file.find("7.jpg") == 3 and file.find("3.jpg") == 7


def test_a_name_that_two_photos_share_gives_neither(tmp_path: Path) -> None:
    """Cameras number their files: masks of another city's frame_001 would be worse than none."""
    images = [(10, "ghent/frame_001.jpg"), (11, "lisbon/frame_001.jpg")]
    for order in (images, images[::-1]):
        file = coco(tmp_path / "a.json", order, 10)
        assert file.find("frame_001.jpg") is None and file.find("frame_001") is None
        assert file.find("ghent/frame_001.jpg") == 10 and file.find("11") == 11


def test_a_photo_without_annotation_is_empty_and_an_unknown_one_has_no_masks(tmp_path: Path) -> None:
    file = coco(tmp_path / "a.json", [(1, "one.jpg"), (2, "two.jpg")], 1)
    rgb = np.zeros((4, 6, 3), np.uint8)
    limits = Limits(min_object_size=1)
    full, empty = (file.label(whole_photo(name, rgb), limits) for name in ("one", "two"))
    assert full is not None and empty is not None and file.label(whole_photo("three", rgb), limits) is None
    assert (full.bits == 1).all() and full.real and not empty.bits.any()
    assert full.valid == (True, False, False, False, False, False) and file.ignored == ["Road"]


@pytest.mark.parametrize(("width", "height"), [(4, 6), (6, 6), (400, 600), (1, 100)])
def test_masks_of_another_shape_are_not_stretched_over_the_photo(tmp_path: Path, width: int, height: int) -> None:
    """A tool that ignores EXIF draws on 6x4 what is upright at 4x6: such masks lie beside what they mean."""
    file = coco(tmp_path / "a.json", [(1, "one.jpg"), (2, "two.jpg")], 1)
    for name in ("one", "two"):
        photo = whole_photo(name, np.zeros((height, width, 3), np.uint8))
        with pytest.raises(ValueError, match=rf"annotated as 6x4 pixels, but the upright photo has {width}x{height}"):
            file.label(photo, Limits(min_object_size=1))


@pytest.mark.parametrize(("width", "height"), [(6, 4), (600, 400), (601, 400), (599, 400), (3, 2)])
def test_masks_of_another_size_and_the_same_shape_are_scaled(tmp_path: Path, width: int, height: int) -> None:
    file = coco(tmp_path / "a.json", [(1, "one.jpg")], 1)
    made = file.label(whole_photo("one", np.zeros((height, width, 3), np.uint8)), Limits(min_object_size=1))
    assert made is not None and made.real and (made.bits == 1).all() and (made.width, made.height) == (width, height)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not COCO; it needs the lists images, annotations, categories"),
        ('{"images": {}, "annotations": [], "categories": []}', "not COCO"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "an entry of images lacks width, height"),
        (
            '{"images": [], "annotations": [{}], "categories": []}',
            "an entry of annotations lacks image_id, category_id",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "an entry of categories lacks name"),
        ('{"images": [3], "annotations": [], "categories": []}', "an entry of images"),
        ('{"images": [], "annotations": [], "categories": []}', "none of its categories is one of the six"),
    ],
)
def test_a_file_that_is_not_coco_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        CocoMasks(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; give a COCO JSON with RLE masks"):
        CocoMasks(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("category", "found"),
    [
        ("TTC Sign: right arrow", 2), ("temporary_traffic-control  sign", 2), ("CONE", 0), ("Vertical Panel", 1),
        ("Construction Vehicle", 4), ("construction-equipment", 5), ("police vehicle", None), ("", None), (": cone", None),
    ],
)  # fmt: skip
def test_categories_in_any_spelling(category: str, found: int | None) -> None:
    assert class_of(category) == found


def test_masks_that_a_source_brings_are_wiped_where_they_are_not_valid() -> None:
    bits = np.full((10, 10), 0b111111, np.uint8)
    photo = whole_photo("a", np.zeros((10, 10, 3), np.uint8), bits)
    made = own_masks(photo)
    assert made.real and set(np.unique(made.bits)) == {0b111111} and made.objects == (1,) * 6
    with pytest.raises(ValueError, match="a brings no masks"):
        own_masks(whole_photo("a", np.zeros((10, 10, 3), np.uint8)))


# ------------------------------------------------------------------------------------- crops, quality, weights


@settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(150, 1200))
def test_tiles_are_squares_inside_the_photo_that_cover_it(width: int, height: int, side: int) -> None:
    boxes = tile_boxes(width, height, side)
    if max(width, height) <= side:
        assert boxes == []
        return
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes} == {(min(side, width, height),) * 2}
    for low, high, length in ((0, 2, width), (1, 3, height)):
        spans = sorted({(box[low], box[high]) for box in boxes})
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(b[0] <= a[1] for a, b in zip(spans, spans[1:], strict=False)), "a strip is seen by no tile"


def test_a_tiled_photo_begins_with_the_whole_of_it() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    photo = tiled_photo("a", rgb, side=200)
    assert photo.crops[0].box == (0, 0, 500, 300) and len(photo.crops) > 4
    for crop in photo.crops:
        x0, y0, x1, y1 = crop.box
        assert np.array_equal(crop.rgb, rgb[y0:y1, x0:x1])


@settings(max_examples=100)
@given(st.integers(0, 5000), st.integers(1, 300))
def test_a_sample_is_evenly_spread_and_never_longer_than_asked_for(count: int, at_most: int) -> None:
    chosen = spread(count, at_most)
    assert len(chosen) == min(count, at_most) == len(set(chosen)) and chosen == sorted(chosen)
    if chosen:
        gaps = np.diff([*chosen, count])
        assert chosen[0] == 0 and chosen[-1] < count and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ([[0, 0], [0, 0]], None), ([[5, 0], [0, 0]], None), ([[5, 0], [0, 5]], 1.0), ([[0, 5], [5, 0]], -1.0),
        ([[5, 5], [5, 5]], 0.0), ([[20, 5], [10, 15]], 0.4),
    ],
)  # fmt: skip
def test_kappa_by_hand_and_as_scikit_learn_has_it(table: list[list[int]], value: float | None) -> None:
    from sklearn.metrics import cohen_kappa_score

    counts = np.array(table, dtype=float)
    assert _kappa(counts) == value
    if value is not None:
        one, two = zip(*[(i, j) for i in (0, 1) for j in (0, 1) for _ in range(table[i][j])], strict=True)
        assert value == pytest.approx(cohen_kappa_score(one, two), abs=1e-4)


def test_classes_that_nobody_looked_for_are_not_counted() -> None:
    from roadwork.data.mask_files import PhotoMasks

    def made(value: int, valid: bool) -> PhotoMasks:
        bits = np.full((4, 4), value, np.uint8)
        return PhotoMasks(bits, (valid,) + (True,) * 5, (1.0,) * 6, "hand", 4, 4, (1,) * 6, True)

    shares = by_label({0: 1, 1: 1, 2: None}, {0: made(1, True), 1: made(0, False), 2: made(0, True)})
    assert shares["roadwork"] == {
        "photos": 2,
        "share_with": {**dict.fromkeys(shares["roadwork"]["share_with"], 0.0), "cone": 1.0},
    }
    assert shares["unlabelled"]["photos"] == 1 and shares["no_roadwork"]["share_with"]["cone"] is None
    both = agreement([(made(1, True), made(1, False)), (made(1, True), made(1, True))])
    assert both["cone"]["photos"] == 1 and both["cone"]["iou"] == 1.0 and both["barrier"]["photos"] == 2


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=r"no such folder; give a saved model's folder or a hub name as OWNER/NAME"):
        model_folder(name)


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == str(tmp_path)


def test_without_the_hub_a_model_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match="accept the licence at https://huggingface.co/nobody/nothing-here .*random-tiny"
    ):
        model_folder("nobody/nothing-here")


def test_a_sam_checkpoint_is_a_file_or_a_name_of_the_registry(tmp_path: Path) -> None:
    file = tmp_path / "sam.pth"
    file.touch()
    assert sam_checkpoint(str(file)) == file
    with pytest.raises(UserError, match=f"one of {', '.join(SAM_URLS)}"):
        sam_checkpoint("vit_x")
