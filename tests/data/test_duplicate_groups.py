"""Photos that look the same and the groups that they join: before the splits are made, so that no copy is on two sides."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import combinations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.duplicates import MAX_BITS, hash_photos, merge_groups_of_duplicates, near_pairs, photo_hash
from roadwork.data.images import decode_photo
from roadwork.data.record import Record
from roadwork.data.sources import Ref
from roadwork.data.splits import assign_splits, carve, gps_cell, leaking_groups
from roadwork.data.street import draw
from tests.data.photos import encode, scene


class Pictures:
    """A source of encoded photos in memory."""

    name, extra_columns = "pictures", list[str]()

    def __init__(self, photos: Sequence[bytes]) -> None:
        self.photos = list(photos)

    def rows(self) -> Iterator[tuple[Ref, dict]]:
        return iter(((0, 0, i), {"id": i}) for i in range(len(self.photos)))

    def load(self, refs: Sequence[Ref]) -> Iterator[tuple[Ref, bytes, bytes | None]]:
        for ref in refs:
            yield ref, self.photos[ref[2]], None

    def stamp(self, ref: Ref) -> str:
        return ""


def refs(number: int) -> list[Ref]:
    return [(0, 0, i) for i in range(number)]


A, B, C = (scene(seed, 320, 240) for seed in (1, 2, 3))


def test_a_copy_by_other_means_is_the_same_photo() -> None:
    """Another format, another quality, another size, a little darker: all of them within the stated bits."""
    copies = [A, np.ascontiguousarray(A[::2, ::2]), (A * 0.85).astype(np.uint8)]
    photos = [
        encode(copies[0]),
        encode(copies[0], "PNG"),
        encode(copies[0], quality=30),
        encode(copies[1]),
        encode(copies[2]),
    ]
    hashes = [int(h, 16) for h in hash_photos(Pictures(photos), refs(5))]
    assert max((hashes[0] ^ other).bit_count() for other in hashes) <= MAX_BITS
    assert min((hashes[0] ^ int(photo_hash(other), 16)).bit_count() for other in (B, C)) > MAX_BITS


def test_copies_of_street_photos_are_told_from_other_streets() -> None:
    """What the net makes of a photo: written again, a smaller copy, brighter, darker, a rim cut off."""
    streets = [draw(index).rgb for index in range(0, 60, 10)]
    hashes = [int(photo_hash(rgb), 16) for rgb in streets]
    for rgb, known in zip(streets, hashes, strict=True):
        height, width = rgb.shape[:2]
        copies = [
            decode_photo(encode(rgb, quality=30))[0],
            cv2.resize(rgb, (width // 2, height // 2), interpolation=cv2.INTER_AREA),
            (rgb * 0.85).astype(np.uint8),
            np.clip(rgb.astype(int) + 12, 0, 255).astype(np.uint8),
            rgb[height // 200 : -(height // 200), width // 200 : -(width // 200)],
        ]
        assert max((known ^ int(photo_hash(copy), 16)).bit_count() for copy in copies) <= MAX_BITS
    assert min((a ^ b).bit_count() for a, b in combinations(hashes, 2)) > MAX_BITS


def test_what_does_not_decode_has_no_hash_and_joins_nobody() -> None:
    photos = [encode(A), b"", b"no photo", encode(B)]
    hashes = hash_photos(Pictures(photos), refs(4))
    assert [bool(h) for h in hashes] == [True, False, False, True]
    groups = ["a", "b", "c", "d"]
    assert merge_groups_of_duplicates(Pictures(photos), refs(4), groups) == groups
    assert hash_photos(Pictures([]), []) == []


class CountedPictures(Pictures):
    """Counts in how many pieces it was sent to another process."""

    sent = 0

    def __getstate__(self) -> dict:
        type(self).sent += 1
        return self.__dict__


def test_processes_are_sent_the_source_once_each_and_hash_alike() -> None:
    photos = [encode(scene(i % 5, 48, 32)) for i in range(64 * 5 + 3)]
    CountedPictures.sent = 0
    hashes = hash_photos(CountedPictures(photos), refs(len(photos)), processes=2)
    assert CountedPictures.sent <= 2
    assert hashes == hash_photos(Pictures(photos), refs(len(photos)), processes=1) and len(set(hashes)) == 5


def test_groups_of_copies_become_one_and_drag_their_own_along() -> None:
    """v3 holds a copy of v1's photo and one of v2's: all three are one group, and v4 stays alone."""
    photos = [encode(x) for x in (A, B, A, B, C)]
    merged = merge_groups_of_duplicates(Pictures(photos), refs(5), ["v1", "v2", "v3", "v3", "v4"])
    assert merged == ["v1", "v1", "v1", "v1", "v4"]


def test_the_order_of_the_photos_does_not_name_the_group() -> None:
    photos = [encode(x) for x in (A, A, B)]
    names = ["z", "m", "b"]
    forward = merge_groups_of_duplicates(Pictures(photos), refs(3), names)
    backward = merge_groups_of_duplicates(Pictures(photos[::-1]), refs(3), names[::-1])
    assert forward == ["m", "m", "b"] and backward == forward[::-1]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 2**64 - 2), max_size=25), st.integers(0, 8))
def test_pairs_are_all_that_are_near_and_each_is_told_once(values: list[int], most: int) -> None:
    values += [value ^ (1 << (i % 64)) for i, value in enumerate(values[:8])]
    values = [value for value in values if 0 < value < 2**64 - 1]
    found = list(near_pairs([f"{value:016x}" for value in values], most))
    expected = {
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= most
    }
    assert set(found) == expected and len(found) == len(expected)


def test_pairs_of_a_fixed_camera_take_no_memory() -> None:
    """Thousands of photos that all look alike are millions of pairs: they are told one by one."""
    hashes = [f"{0x123456789ABCDEF0 ^ (1 << i % 4):016x}" for i in range(400)]
    tracemalloc.start()
    try:
        told = sum(1 for _ in near_pairs(hashes))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert told == 400 * 399 // 2 and peak < 2**20


def test_a_copy_of_a_test_photo_is_kept_out_of_training() -> None:
    records = [Record(str(i), label=i % 2, split=split) for i, split in enumerate(["test", "train", "train", "train"])]
    photos = [encode(x) for x in (A, A, B, C)]
    merged = merge_groups_of_duplicates(Pictures(photos), refs(4), ["t", "a", "b", "c"])
    assigned = assign_splits(records, merged, 0.0)
    assert assigned.split == ["test", None, "train", "train"] and assigned.reason[1] == "group_in_test"


def test_leaks_are_named_and_questions_without_labels_are_none() -> None:
    assert leaking_groups(["a", "a", "b", "c", "c"], ["train", "test", "val", "train", "predict"]) == ["a"]
    assert leaking_groups([], []) == []


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_a_held_out_part_has_its_share_of_photos(fraction: float) -> None:
    groups, labels = [f"g{i // 3}" for i in range(600)], [i // 3 % 2 for i in range(600)]
    held = carve(groups, labels, fraction, seed=1)
    assert len(held) == pytest.approx(600 * fraction, abs=4)
    assert np.mean([labels[i] for i in held]) == pytest.approx(0.5, abs=0.1)


@settings(max_examples=60)
@given(st.floats(-90, 90), st.floats(-180, 180))
def test_every_place_has_one_cell_and_the_date_line_is_no_border(latitude: float, longitude: float) -> None:
    cell = gps_cell(latitude, longitude)
    assert cell.startswith("cell:") and cell == gps_cell(latitude, longitude)
    assert gps_cell(latitude, 180.0) == gps_cell(latitude, -180.0)
