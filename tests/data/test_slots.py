"""Shared memory of a batch, and what fills it: layouts that never overlap, damaged samples that cost one row each."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.index import ShardIndex
from roadwork.data.ranges import RangeReader
from roadwork.data.slots import TASK, TEXT_DIM, SlotLayout
from roadwork.data.worker import fill_rows
from tests.data.sheets import SIZE, build, sample

LAYOUT = SlotLayout(batch=4, max_views=12, view_size=SIZE, mask_size=SIZE // 4, masks=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "shards", {"train": 6})


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_arrays_of_a_slot_never_overlap_and_stay_inside(
    batch: int, most: int, size: int, masks: bool, text: bool, data: st.DataObject
) -> None:
    layout = SlotLayout(batch, most, 16 * size, 4 * size, masks, text)
    slot = np.zeros(layout.slot_bytes, np.uint8)
    views = data.draw(st.integers(1, most))
    arrays = layout.arrays(slot, views)
    assert set(arrays) == {"views", *(["masks"] if masks else []), *(["text"] if text else [])}
    assert arrays["views"].shape == (batch, views, 16 * size, 16 * size, 3)
    for number, array in enumerate(arrays.values(), start=1):
        assert np.shares_memory(array, slot) and not array.any()
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(arrays.values(), start=1))
    assert layout.slot_bytes % 4096 == 0


def test_what_is_not_asked_for_takes_no_memory() -> None:
    full, bare = LAYOUT, dataclasses.replace(LAYOUT, masks=False, text=False)
    assert full.slot_bytes > bare.slot_bytes >= 4 * 12 * SIZE * SIZE * 3


def tasks(index: ShardIndex, rows: list[int]) -> np.ndarray:
    made = np.zeros(len(rows), TASK)
    for place, row in enumerate(rows):
        made[place] = (
            place, index.shard[row], index.num_views[row], index.views_crc[row],
            index.views_offset[row], index.views_size[row], index.masks_offset[row], index.masks_size[row],
            index.meta_offset[row], index.meta_size[row],
        )  # fmt: skip
    return made


def filled(folder: Path, rows: list[int], layout: SlotLayout = LAYOUT) -> tuple[dict, list[tuple[int, str]]]:
    index = ShardIndex.open(folder, "train")
    slot = np.full(layout.slot_bytes, 7, np.uint8)  # what an earlier batch left
    arrays = layout.arrays(slot, 12)
    return arrays, fill_rows(tasks(index, rows), RangeReader(index.paths), layout, arrays)


def test_rows_hold_their_photo_and_nothing_of_an_earlier_batch(folder: Path) -> None:
    arrays, failed = filled(folder, [3, 0, 5, 1])
    index = ShardIndex.open(folder, "train")
    assert failed == []
    for place, row in enumerate([3, 0, 5, 1]):
        count = int(index.num_views[row])
        seen = arrays["views"][place].transpose(0, 3, 1, 2)
        assert np.array_equal(seen[:count], index.read_views(row)) and not seen[count:].any()
        masks = index.read_masks(row)
        assert np.array_equal(
            arrays["masks"][place, :count], 0 * arrays["masks"][place, :count] if masks is None else masks
        )
        assert not arrays["masks"][place, count:].any()
        assert np.isnan(arrays["text"][place]).all()


def test_an_empty_row_is_black(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    slot = np.full(LAYOUT.slot_bytes, 7, np.uint8)
    arrays = LAYOUT.arrays(slot, 12)
    nothing = np.zeros(1, TASK)
    assert fill_rows(nothing, RangeReader(index.paths), LAYOUT, arrays) == []
    assert not arrays["views"][0].any() and not arrays["masks"][0].any() and np.isnan(arrays["text"][0]).all()


def overwrite(folder: Path, member: str, data: bytes, at: int = 0) -> None:
    """Bytes of a member changed in place; offsets and sizes stay."""
    path = folder / "train-000000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmember(member).offset_data + at
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("member", "data", "words"),
    [
        ("00000003.views.jpg", b"\xff\xff", "CRC-32"),
        ("00000003.masks.png", b"\0\0\0\0\0\0\0\0", "mask PNG does not decode"),
        ("00000003.json", b"\xff\xfe", "metadata"),
        ("00000003.json", b"[1, 2, 3]#", "metadata"),
    ],
)
def test_a_damaged_member_costs_its_own_row_and_says_why(folder: Path, member: str, data: bytes, words: str) -> None:
    """Metadata too: they have no checksum of their own, and a loader process must outlive them."""
    before, _ = filled(folder, [2, 3, 4])
    overwrite(folder, member, data)
    arrays, failed = filled(folder, [2, 3, 4])
    assert [row for row, _ in failed] == [1] and words in failed[0][1], failed
    assert not arrays["views"][1].any() and not arrays["masks"][1].any()
    for row in (0, 2):
        assert np.array_equal(arrays["views"][row], before["views"][row])


def test_a_text_of_another_length_is_named(tmp_path: Path) -> None:
    from roadwork.data.index import write_index
    from roadwork.data.scan import scan_shard
    from roadwork.data.shards import write_shard

    tmp_path.joinpath("shards").mkdir()
    path = tmp_path / "shards" / "train-000000.tar"
    texts = [np.linspace(0, 1, TEXT_DIM).tolist(), [0.5] * 10, None]
    write_shard(path, [sample(i, text=text) for i, text in enumerate(texts)])
    write_index(path.parent, [scan_shard(path)], {"note": "made by a test"})
    arrays, failed = filled(path.parent, [0, 1, 2])
    assert [row for row, _ in failed] == [1] and "its text has shape (10,), not (384,)" in failed[0][1]
    np.testing.assert_allclose(arrays["text"][0], np.linspace(0, 1, TEXT_DIM), atol=1e-6)
    assert np.isnan(arrays["text"][2]).all()


def test_reasons_travel_between_processes(folder: Path) -> None:
    overwrite(folder, "00000001.views.jpg", b"\0\0")
    _, failed = filled(folder, [1])
    assert json.loads(json.dumps(failed)) == [list(line) for line in failed]
