"""The embedded street benchmark: what its users rely on."""

import ast
import json
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roadwork.data import street
from roadwork.data.street import CITIES, MASK_CLASSES, PRIOR, draw, target_cities, write_parquet
from roadwork.errors import UserError

REAL_COLUMNS = {
    "id": pa.int64(), "width": pa.int64(), "height": pa.int64(), "license": pa.int64(), "flickr_url": pa.float64(),
    "coco_url": pa.float64(), "date_captured": pa.int64(), "gps": pa.string(), "city_name": pa.string(),
    "scene_description": pa.string(), "video_info.frame_id": pa.string(), "video_info.seq_id": pa.int64(),
    "video_info.vid_id": pa.string(), "scene_level_tags.daytime": pa.string(),
    "scene_level_tags.scene_environment": pa.string(), "scene_level_tags.travel_alteration": pa.string(),
    "scene_level_tags.weather": pa.string(), "label": pa.int64(),
}  # fmt: skip
"""Name and type of every column of the real data set but `image`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("street")
    write_parquet(out, 72, seed=3, processes=2)
    return out


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict]:
    found = []
    for path in sorted(folder.glob("*.parquet")):
        found += [{**row, "split": path.name.split("-")[0]} for row in pq.read_table(path).to_pylist()]
    return found


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    one = write_parquet(tmp_path / "one", 24, seed=5, processes=1)
    three = write_parquet(tmp_path / "three", 24, seed=5, processes=3)
    assert [p.name for p in one] == [p.name for p in three]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))


def test_a_photo_depends_on_seed_and_index_alone() -> None:
    first = draw(7, 5)
    draw(11, 6)
    again, other = draw(7, 5), draw(7, 6)
    assert (first.rgb == again.rgb).all() and (first.masks == again.masks).all() and first.row == again.row
    assert (first.rgb != other.rgb).mean() > 0.3


def test_schema_is_the_real_one_plus_masks(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        schema = pq.read_schema(path)
        assert {f.name: f.type for f in schema if f.name not in ("image", "masks")} == REAL_COLUMNS
        assert schema.field("masks").type == pa.binary()
        assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_files_are_named_by_split_and_hold_every_photo_once(folder: Path, rows: list[dict]) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]
    assert sorted(row["id"] for row in rows) == list(range(72))


def test_description_and_alteration_exist_for_positives_only(rows: list[dict]) -> None:
    assert {row["label"] for row in rows} == {0, 1}
    for row in rows:
        assert (row["scene_description"] is not None) == (row["label"] == 1)
        assert (row["scene_level_tags.travel_alteration"] is not None) == (row["label"] == 1)


def test_masks_agree_with_the_label(rows: list[dict]) -> None:
    seen = 0
    for row in rows:
        image = cv2.imdecode(np.frombuffer(row["image"]["bytes"], np.uint8), cv2.IMREAD_COLOR)
        masks = cv2.imdecode(np.frombuffer(row["masks"], np.uint8), cv2.IMREAD_UNCHANGED)
        assert image.shape == (720, 1280, 3) and masks.shape == (720, 1280) and masks.dtype == np.uint8
        assert masks.max() < 1 << len(MASK_CLASSES)
        assert masks.any() == (row["label"] == 1)
        seen |= int(np.bitwise_or.reduce(masks, axis=None))
    assert seen == (1 << len(MASK_CLASSES)) - 1, "every class occurs"


def test_a_mask_covers_what_was_drawn_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its work zone the same frame has the same pixels away from the zone, and other pixels under its masks."""
    clear_day = street.Conditions("Cloudy", "Light", False)
    index = next(
        video.start + 1
        for video in (street._video(n, 0) for n in range(200))
        if video.site and video.conditions == clear_day and draw(video.start + 1, 0).row["label"]
    )
    with_zone = draw(index, 0)
    monkeypatch.setattr(street, "_MIN_PIXELS", 0)
    place, _, plain = street._layout(street._locate(index)[0], 0)
    monkeypatch.setattr(street, "_layout", lambda number, seed: (place, [], plain))
    without = draw(index, 0)
    assert not without.masks.any()
    changed = np.abs(with_zone.rgb.astype(int) - without.rgb).max(2) > 12
    under = with_zone.masks > 0
    assert changed[under].mean() > 0.8
    around = cv2.dilate(under.astype(np.uint8), np.ones((61, 61))) > 0
    assert changed[~around].mean() < 0.01


def test_no_video_is_in_two_splits_and_videos_have_several_frames(rows: list[dict]) -> None:
    splits, frames, cities, places = defaultdict(set), defaultdict(list), defaultdict(set), defaultdict(set)
    for row in rows:
        video = row["video_info.vid_id"]
        splits[video].add(row["split"])
        frames[video].append(row["video_info.frame_id"])
        cities[video].add(row["city_name"])
        places[video].add(row["gps"] is None)
    assert all(len(s) == 1 for s in splits.values())
    assert all(len(f) == len(set(f)) for f in frames.values())
    assert min(len(f) for f in frames.values()) >= 2
    assert all(len(c) == 1 for c in cities.values()) and all(len(p) == 1 for p in places.values())


def test_priors_shares_and_tags_over_many_videos() -> None:
    """Read from the plan of 400 videos, which needs no drawing."""
    videos = [street._video(n, 0) for n in range(400)]
    photos = {s: sum(v.frames for v in videos if v.split == s) for s in ("train", "test")}
    assert photos["test"] / sum(photos.values()) == pytest.approx(0.3, abs=0.02)
    for split, prior in PRIOR.items():
        shown = sum(v.frames - v.clear for v in videos if v.split == split and v.site)
        assert shown / photos[split] == pytest.approx(prior, abs=0.05)
    served = [v.city.name in target_cities() for v in videos if v.split == "test"]
    learnt = [v.city.name in target_cities() for v in videos if v.split == "train"]
    assert np.mean(served) > 0.7 and 0.1 < np.mean(learnt) < 0.4
    assert {v.city.name for v in videos if v.split == "train"} == {c.name for c in CITIES}
    assert len({v.start for v in videos}) == 400 and all(street._locate(v.start) == (v.number, 0) for v in videos)


def test_gps_is_a_string_near_its_city_and_sometimes_missing(rows: list[dict]) -> None:
    where = {c.name: (c.latitude, c.longitude) for c in CITIES}
    known = [row for row in rows if row["gps"] is not None]
    assert known
    for row in known:
        latitude, longitude = json.loads(row["gps"])
        assert abs(latitude - where[row["city_name"]][0]) < 0.2 and abs(longitude - where[row["city_name"]][1]) < 0.2
    for row in rows:
        assert isinstance(ast.literal_eval(row["scene_level_tags.weather"]), list)
    missing = [
        street._row(v, 0, 0, np.zeros((2, 2), np.uint8))["gps"] is None
        for v in (street._video(n, 0) for n in range(300))
    ]
    assert 0.01 < np.mean(missing) < 0.12


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 24 photos"):
        write_parquet(tmp_path, 3)
    with pytest.raises(UserError, match="numbered from 0"):
        draw(-1)
