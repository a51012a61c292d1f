"""Thresholds, unions and sizes on hand-made outputs; run lengths against hand cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from roadwork.data.mask_files import PhotoMasks
from roadwork.errors import UserError
from roadwork.labelling.backend import Canvas, Crop, Limits, Photo
from roadwork.labelling.crops import tile_boxes, whole_photo
from roadwork.labelling.quality import agreement, by_label, suspicious
from roadwork.labelling.real import CocoMasks, RealBackend, class_of
from roadwork.labelling.rle import decode_counts, decode_segmentation, decompress_counts
from roadwork.labelling.sam3 import Sam3Backend
from tests.labelling.coco_writer import compress_counts, encode_counts


def _square(height: int, width: int, top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_canvas_unites_objects_and_keeps_the_largest_score() -> None:
    canvas = Canvas(100, 50, Limits(min_object_size=100))
    box = (0, 0, 100, 50)
    assert canvas.add(1, box, _square(50, 100, 0, 0, 10), 0.8)
    assert canvas.add(1, box, _square(50, 100, 5, 5, 10), 0.9)
    assert canvas.add(4, box, _square(50, 100, 0, 0, 10), 0.75)
    assert not canvas.add(2, box, _square(50, 100, 0, 0, 9), 0.99), "81 pixels are below the smallest object"
    masks = canvas.masks("hand")
    assert (masks.bits >> 1 & 1).sum() == 175
    assert masks.bits[0, 0] == 0b10010
    assert masks.confidence == (0.0, 0.9, 0.0, 0.0, 0.75, 0.0)
    assert masks.objects == (0, 2, 0, 0, 1, 0)


def test_object_size_is_in_pixels_of_the_photo_whatever_the_canvas() -> None:
    canvas = Canvas(4032, 3024, Limits(min_object_size=100))
    assert canvas.bits.shape == (1008, 1344)
    box = (0, 0, 4032, 3024)
    assert canvas.add(0, box, _square(1008, 1344, 0, 0, 4), 1.0), "16 canvas pixels are 144 of the photo"
    assert not canvas.add(0, box, _square(1008, 1344, 0, 0, 3), 1.0), "9 canvas pixels are 81 of the photo"


def test_a_crop_lands_where_it_was_cut() -> None:
    canvas = Canvas(200, 100, Limits(min_object_size=1))
    top, left, bottom, right = canvas.window((150, 50, 200, 100))
    canvas.add(3, (150, 50, 200, 100), np.ones((bottom - top, right - left), bool), 1.0)
    assert canvas.bits[50:, 150:].all() and canvas.bits.astype(bool).sum() == 2500


def test_invalid_classes_are_wiped() -> None:
    canvas = Canvas(20, 20, Limits(min_object_size=1))
    canvas.add(0, (0, 0, 20, 20), np.ones((20, 20), bool), 1.0)
    masks = canvas.masks("hand", valid=[False] + [True] * 5)
    assert not masks.bits.any() and masks.confidence[0] == 0 and not masks.valid[0]


@pytest.mark.parametrize(("width", "height"), [(4032, 3024), (1920, 1080), (1280, 720), (3000, 500), (1009, 1008)])
def test_tiles_cover_the_photo_and_overlap(width: int, height: int) -> None:
    seen = np.zeros((height, width), np.uint8)
    boxes = tile_boxes(width, height)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and x1 - x0 == y1 - y0 <= 1008
        seen[y0:y1, x0:x1] += 1
    assert seen.min() >= 1
    lefts = sorted({box[0] for box in boxes})
    side = boxes[0][2] - boxes[0][0]
    assert all(b - a <= 0.85 * side + 1 for a, b in zip(lefts, lefts[1:], strict=False))
    assert tile_boxes(1008, 800) == []


@pytest.fixture(scope="module")
def sam3() -> Sam3Backend:
    return Sam3Backend("random-tiny", limits=Limits(score=0.7, presence=0.7, min_object_size=4))


class _Outputs:
    """The fields of Sam3ImageSegmentationOutput that the post-processing reads."""

    def __init__(self, **fields: torch.Tensor) -> None:
        self.__dict__.update(fields)


def _outputs(logits: list[float], presence: float, masks: np.ndarray) -> _Outputs:
    return _Outputs(
        pred_logits=torch.tensor([logits]),
        presence_logits=torch.tensor([[presence]]),
        pred_boxes=torch.zeros(1, len(logits), 4),
        pred_masks=torch.tensor(np.where(masks, 9.0, -9.0), dtype=torch.float32)[None],
        semantic_seg=torch.tensor(np.where(masks.any(0), 9.0, -9.0), dtype=torch.float32)[None, None],
    )


def _add(sam3: Sam3Backend, outputs: _Outputs) -> Canvas:
    canvas = Canvas(16, 8, sam3.limits)
    sam3._add_objects(outputs, 0, 2, canvas, Crop((0, 0, 16, 8), np.zeros((8, 16, 3), np.uint8)))
    return canvas


def test_sam3_scores_are_multiplied_by_presence(sam3: Sam3Backend) -> None:
    masks = np.stack([_square(8, 16, 0, 0, 4), _square(8, 16, 0, 8, 4), _square(8, 16, 4, 4, 1)])
    # sigmoid: 4 -> 0.982, 1.2 -> 0.769, presence 2 -> 0.881; 0.769 * 0.881 = 0.677 is below 0.7
    canvas = _add(sam3, _outputs([4.0, 1.2, 4.0], 2.0, masks))
    assert canvas.objects[2] == 1, "the second scores too little, the third is too small"
    assert (canvas.bits == 4).sum() == 16
    assert canvas.confidence[2] == pytest.approx(0.982 * 0.881, abs=1e-3)


def test_sam3_without_presence_finds_nothing(sam3: Sam3Backend) -> None:
    canvas = _add(sam3, _outputs([9.0], 0.8, _square(8, 16, 0, 0, 8)[None]))  # sigmoid(0.8) = 0.69
    assert not canvas.bits.any()


def test_sam3_crowd_is_enlarged_in_parts(sam3: Sam3Backend) -> None:
    masks = np.stack([_square(8, 16, 2 * (i // 8) % 8, 2 * (i % 8), 2) for i in range(32)])
    canvas = _add(sam3, _outputs([9.0] * 32, 9.0, masks))
    assert canvas.objects[2] == 32 and (canvas.bits == 4).all()


def test_sam3_semantic_map_drops_small_parts() -> None:
    backend = Sam3Backend("random-tiny", limits=Limits(min_object_size=4), semantic=True)
    masks = (_square(8, 16, 0, 0, 3) | _square(8, 16, 6, 12, 1))[None]
    canvas = _add(backend, _outputs([-9.0], 3.0, masks))
    assert (canvas.bits == 4).sum() == 9 and canvas.objects[2] == 1


# ------------------------------------------------------------------------------------------------ COCO


def test_plain_run_lengths_go_down_the_columns() -> None:
    mask = decode_counts([1, 2, 2, 1], 3, 2)
    assert mask.astype(int).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert encode_counts(mask) == [1, 2, 2, 1]
    assert encode_counts(np.ones((2, 2), bool)) == [0, 4]


@pytest.mark.parametrize(
    ("counts", "text"),
    # Worked by hand from maskApi.c: 6 -> '6'; 1 -> '1'; 40 -> 8 with more (48+40='X'), then 1; from the fourth on
    # differences to the count two before: 38 - 1 = 37 -> 5 with more ('U'), 1.
    [([6], "6"), ([6, 1], "61"), ([6, 1, 40], "61X1"), ([6, 1, 40, 38], "61X1U1"), ([5, 5, 5, 4], "555O")],
)
def test_compressed_run_lengths(counts: list[int], text: str) -> None:
    assert decompress_counts(text) == counts
    assert compress_counts(counts) == text


def test_compressed_run_lengths_round_trip() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((61, 47)) < 0.3
    text = compress_counts(encode_counts(mask))
    assert (decode_segmentation({"size": [61, 47], "counts": text}, 61, 47) == mask).all()


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [3, 2], "counts": [1, 2]},
        {"size": [2, 3], "counts": [6]},
        {"size": [3, 2], "counts": "a~"},
        7,
        [[1, 2]],
    ],
)
def test_damaged_segmentations_are_refused(segmentation: object) -> None:
    with pytest.raises(ValueError, match="RLE|polygon|segmentation"):
        decode_segmentation(segmentation, 3, 2)


def test_polygon() -> None:
    assert decode_segmentation([[1, 1, 5, 1, 5, 5, 1, 5]], 8, 8).sum() in range(16, 26)


def _coco(path: Path) -> Path:
    mask = _square(20, 30, 2, 3, 5)
    content = {
        "images": [
            {"id": 1, "file_name": "train/one.jpg", "width": 30, "height": 20},
            {"id": 2, "file_name": "train/two.jpg", "width": 30, "height": 20},
        ],
        "categories": [
            {"id": 4, "name": "Tubular Marker"},
            {"id": 5, "name": "Temporary Traffic Control Sign: left arrow"},
            {"id": 6, "name": "Police Vehicle"},
        ],
        "annotations": [
            {"image_id": 1, "category_id": 4, "segmentation": {"size": [20, 30], "counts": encode_counts(mask)}},
            {"image_id": 1, "category_id": 6, "segmentation": {"size": [20, 30], "counts": [0, 600]}},
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_coco_file_tells_absent_from_empty(tmp_path: Path) -> None:
    backend = RealBackend(CocoMasks(str(_coco(tmp_path / "a.json"))))
    rgb = np.zeros((20, 30, 3), np.uint8)
    one, two, three = backend.label([whole_photo(name, rgb) for name in ("one", "two.jpg", "three")])
    assert one is not None and two is not None
    assert three is None, "a photo that the file does not know has no mask"
    assert one.valid == two.valid == (True, False, True, False, False, False)
    assert (one.bits == 1).sum() == 25 and one.bits[2, 3] == 1
    assert not two.bits.any() and two.confidence == (0.0,) * 6, "known and without annotation: an empty mask"


def test_real_masks_are_preferred_over_the_fallback(tmp_path: Path) -> None:
    class Fallback:
        origin = "fallback"

        def label(self, photos: list[Photo]) -> list[PhotoMasks | None]:
            return [Canvas(p.width, p.height, Limits()).masks(self.origin) for p in photos]

    backend = RealBackend(CocoMasks(str(_coco(tmp_path / "a.json"))), fallback=Fallback())  # type: ignore[arg-type]
    rgb = np.zeros((20, 30, 3), np.uint8)
    own = whole_photo("own", rgb, np.full((10, 15), 32, np.uint8))
    made = backend.label([whole_photo("three", rgb), whole_photo("one", rgb), own])
    assert [m.origin for m in made if m] == ["fallback", "annotations a.json", "masks of the source"]
    assert made[2] is not None and made[2].confidence[5] == 1.0


def test_categories() -> None:
    names = [
        "Cone",
        "Drum",
        "Fence",
        "Arrow Board",
        "Worker",
        "Work Vehicle",
        "work_equipment",
        "Police Officer",
        "Road",
    ]
    assert [class_of(name) for name in names] == [0, 0, 1, 2, 3, 4, 5, None, None]


def test_a_file_without_our_classes_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cats.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(UserError, match="none of its categories is one of the six classes") as caught:
        CocoMasks(str(path))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- quality


def _masks(bits: np.ndarray, objects: int = 1) -> PhotoMasks:
    count = tuple(objects if (bits >> k & 1).any() else 0 for k in range(6))
    return PhotoMasks(bits, (True,) * 6, (0.0,) * 6, "hand", bits.shape[1], bits.shape[0], count)


def test_agreement_by_hand() -> None:
    one = _square(10, 10, 0, 0, 4).astype(np.uint8)
    two = _square(10, 10, 0, 2, 4).astype(np.uint8)
    empty = np.zeros((10, 10), np.uint8)
    report = agreement([(_masks(one), _masks(two)), (_masks(empty), _masks(empty))])
    assert report["cone"] == {"photos": 2, "iou": round(8 / 24, 4), "presence_kappa": 1.0}
    assert report["worker"]["iou"] is None
    assert agreement([(_masks(one), _masks(empty)), (_masks(empty), _masks(one))])["cone"]["presence_kappa"] == -1.0


def test_negatives_full_of_cones_are_listed() -> None:
    cones = np.ones((4, 4), np.uint8)
    found = {0: _masks(cones, 5), 1: _masks(cones * 0), 2: _masks(cones, 9)}
    assert by_label({0: 0, 1: 0, 2: 1}, found)["no_roadwork"]["share_with"]["cone"] == 0.5
    listed = suspicious({"a": (0, found[0]), "b": (0, found[1]), "c": (1, found[2])})
    assert [line["id"] for line in listed] == ["a"]
