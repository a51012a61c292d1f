"""No group on two sides, whatever the data look like."""

from __future__ import annotations

import numpy as np
import pytest
from geopy.distance import geodesic
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.record import Record
from roadwork.data.splits import assign_splits, carve, gps_cell, group_of, leaking_groups
from roadwork.errors import UserError

records = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from([0, 1, None]), st.sampled_from([None, "train", "test", "val"])),
    min_size=1,
    max_size=40,
)


def _records(rows: list[tuple[int, int | None, str | None]]) -> list[Record]:
    return [Record(str(i), label=y, group=f"v{g}", split=s) for i, (g, y, s) in enumerate(rows)]


@settings(max_examples=200, deadline=None)
@given(records, st.floats(0, 0.5), st.integers(0, 5))
def test_no_group_is_in_two_splits_and_nothing_is_lost(rows, fraction: float, seed: int) -> None:  # type: ignore[no-untyped-def]
    photos = _records(rows)
    groups = [group_of(photo) for photo in photos]
    assigned = assign_splits(photos, groups, fraction, seed=seed)
    kept = [(g, s) for g, s in zip(groups, assigned.split, strict=True) if s is not None]
    assert leaking_groups([g for g, _ in kept], [s for _, s in kept if s]) == []
    for photo, split, reason in zip(photos, assigned.split, assigned.reason, strict=True):
        assert (split is None) == bool(reason)
        if photo.label is None:
            assert split == "predict"
        elif photo.split == "test":
            assert split == "test"


def test_a_train_photo_of_a_test_video_is_rejected_by_name() -> None:
    photos = _records([(1, 1, "train"), (1, 0, "test"), (2, 1, "train"), (3, 0, "val"), (3, 1, "train")])
    assigned = assign_splits(photos, [group_of(p) for p in photos], 0.0)
    assert assigned.split == [None, "test", "train", "val", None]
    assert assigned.reason == ["group_in_test", "", "", "", "group_in_val"]


def test_val_has_its_share_of_both_classes_by_whole_groups() -> None:
    rng = np.random.default_rng(0)
    groups = [f"v{i // 4}" for i in range(2000)]
    labels = (rng.random(2000) < 0.8).astype(int).tolist()
    held = carve(groups, labels, 0.15, seed=3)
    assert 0.13 < len(held) / 2000 < 0.17
    assert 0.75 < np.mean([labels[i] for i in held]) < 0.85
    assert {groups[i] for i in held}.isdisjoint(groups[i] for i in set(range(2000)) - set(held))
    assert carve(groups, labels, 0.15, seed=4) != held


def test_carving_does_not_depend_on_the_order_of_the_records() -> None:
    groups = [f"v{i // 3}" for i in range(90)]
    labels = [i % 2 for i in range(90)]
    order = np.random.default_rng(1).permutation(90)
    first = {groups[i] for i in carve(groups, labels, 0.2, 0)}
    again = {
        [groups[j] for j in order][i] for i in carve([groups[j] for j in order], [labels[j] for j in order], 0.2, 0)
    }
    assert first == again and first


def test_one_group_cannot_be_carved_and_two_can() -> None:
    assert carve(["a"] * 5, [0, 1, 0, 1, 1], 0.2, 0) == []
    held = carve(["a", "a", "b", "b", "b"], [0, 1, 0, 1, 1], 0.2, 0)
    assert held in ([0, 1], [2, 3, 4])


def test_group_is_the_video_else_the_cell_else_the_photo() -> None:
    assert group_of(Record("1", group="vid", latitude=1.0, longitude=2.0)) == "vid"
    assert group_of(Record("1", latitude=40.0, longitude=-80.0)) == group_of(
        Record("2", latitude=40.0, longitude=-80.0)
    )
    assert group_of(Record("1")) != group_of(Record("2"))


@pytest.mark.parametrize("latitude", [0.0, 40.44, 69.6, -54.8])
def test_cells_are_about_100_metres_wide(latitude: float) -> None:
    longitudes = np.arange(10.0, 10.2, 0.0001)
    cells = [gps_cell(latitude, lon) for lon in longitudes]
    width = geodesic((latitude, 10.0), (latitude, 10.2)).m / len(set(cells))
    assert 85 < width < 115
    assert gps_cell(-17.0, 180.0) == gps_cell(-17.0, -180.0)


def test_impossible_fractions_are_refused() -> None:
    with pytest.raises(UserError, match="val-fraction"):
        assign_splits([Record("1", label=1)], ["a"], 1.0)
