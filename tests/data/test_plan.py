"""The plan of a build, before a pixel is decoded: who is in, where, how heavy, in which shard, and under which name."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data import geo
from roadwork.data.plan import (
    BuildOptions,
    Entry,
    Plan,
    Rejection,
    Target,
    cut_shards,
    describe_weights,
    fingerprint,
    known_cities,
    labels_of,
    latlon_of,
    make_plan,
    meta_of,
    scan,
    settle,
    target_points,
)
from roadwork.data.record import Record
from roadwork.data.sources import Ref
from roadwork.errors import UserError


class Rows:
    """A source of rows in memory."""

    def __init__(self, rows: Sequence[dict[str, Any]], name: str = "rows") -> None:
        self.table, self.name, self.extra_columns = list(rows), name, list[str]()
        self.version = "1"

    def rows(self) -> Iterator[tuple[Ref, dict[str, Any]]]:
        for i, row in enumerate(self.table):
            yield (0, 0, i), dict(row)

    def load(self, refs: Sequence[Ref]) -> Iterator[tuple[Ref, bytes, bytes | None]]:
        raise AssertionError("a plan needs no pixels")

    def stamp(self, ref: Ref) -> str:
        return self.version


def row(number: int, **changes: Any) -> dict[str, Any]:
    values = {
        "id": number,
        "label": number % 2,
        "gps": [40.0 + number / 10, -80.0],
        "city_name": "pittsburgh" if number % 2 else "Munich",
        "video_info.vid_id": f"v{number // 2}",
        "split": "train",
    }
    return values | changes


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**({"source": "rows", "out": "out", "val_fraction": 0.0} | changes))


def entry(number: int, split: str = "train", **changes: Any) -> Entry:
    facts: dict[str, Any] = {"label": number % 2, "city": "pittsburgh", "latitude": 40.0, "longitude": -80.0} | changes
    return Entry((0, 0, number), Record(str(number), **facts), split, f"v{number}", f"{split}-{number:09d}")


# ------------------------------------------------------------------------------------------------------ rows


def test_every_row_is_used_or_rejected_by_name() -> None:
    rows = [
        row(0), row(1, id=None), row(2, label=9), row(0, gps=None), row(4), row(4, split="test"), row(5, id=" "),
        row(6, label="maybe"),
    ]  # fmt: skip
    refs, records, rejected, read = scan(Rows(rows).rows())
    assert read == 8 == len(records) + len(rejected)
    assert [record.id for record in records] == ["0", "4", "4"] and refs == [(0, 0, 0), (0, 0, 4), (0, 0, 5)]
    assert [(line.id, line.reason.partition(":")[0]) for line in rejected] == [
        ("row (0, 0, 1)", "missing_id"),
        ("2", "label_outside_0_1"),
        ("0", "duplicate_id"),
        (" ", "missing_id"),
        ("6", "label_outside_0_1"),
    ]


def test_the_same_number_in_two_published_splits_is_two_photos_and_marked() -> None:
    _, records, rejected, _ = scan(Rows([row(7), row(7, split="test"), row(8)]).rows())
    assert rejected == [] and [bool(record.extra.get("ambiguous_id")) for record in records] == [True, True, False]


def test_numbers_and_words_of_an_id_are_one_id() -> None:
    _, records, rejected, _ = scan(Rows([row(7), row(0, id="7"), row(0, id=" 7 ")]).rows())
    assert len(records) == 1 and [line.reason for line in rejected] == ["duplicate_id"] * 2


def test_a_rejection_is_one_line_of_json_in_any_script() -> None:
    line = Rejection("東京/1", "no_image", "train").line()
    assert line.endswith("\n") and line.count("\n") == 1 and "東京" in line
    assert json.loads(line) == {"id": "東京/1", "reason": "no_image", "split": "train"}


def test_a_source_of_nothing_usable_names_the_first_reason() -> None:
    with pytest.raises(UserError, match=r"none of its 2 rows can be used; first reason: label_outside_0_1: 3 \(id 0\)"):
        make_plan(Rows([row(0, label=3), row(1, id="")]), options())
    with pytest.raises(UserError, match=r"first reason: id_control_character \(id a\\rb\\nc\)"):
        make_plan(Rows([row(0, id="a\rb\nc")]), options())
    with pytest.raises(UserError, match="none of its 0 rows can be used; first reason: there are none"):
        make_plan(Rows([]), options())


# ------------------------------------------------------------------------------------------------------ plan


def test_a_plan_gives_every_photo_a_split_a_key_and_a_place() -> None:
    rows = [row(i) for i in range(40)] + [row(i, split="test", **{"video_info.vid_id": f"t{i}"}) for i in range(10)]
    rows += [row(i, label=None) for i in range(90, 95)] + [row(99, **{"video_info.vid_id": "t1"})]
    plan = make_plan(Rows(rows), options(val_fraction=0.2, samples_per_shard=7))
    assert plan.rows_read == 56 and len(plan.entries) == 55
    assert [(line.id, line.reason) for line in plan.rejected] == [("99", "group_in_test")]
    splits = Counter(entry.split for entry in plan.entries)
    assert splits["test"] == 10 and splits["predict"] == 5 and 4 <= splits["val"] <= 12
    assert len({entry.key for entry in plan.entries}) == 55
    for split, count in splits.items():
        keys = [entry.key for entry in plan.entries if entry.split == split]
        assert keys == [f"{split}-{i:09d}" for i in range(count)]
    placed = [entry.key for shard in plan.shards for entry in shard.entries]
    assert sorted(placed) == sorted(entry.key for entry in plan.entries)
    groups = {split: {entry.group for entry in plan.entries if entry.split == split} for split in ("train", "val")}
    assert not groups["train"] & groups["val"]


def test_equal_plans_have_equal_fingerprints_and_whatever_matters_changes_them() -> None:
    rows = [row(i) for i in range(20)]
    base = make_plan(Rows(rows), options()).fingerprint()
    assert make_plan(Rows(rows), options(out="elsewhere", processes=3)).fingerprint() == base
    changed: dict[str, Plan] = {
        "another view size": make_plan(Rows(rows), options(view_size=64)),
        "another quality": make_plan(Rows(rows), options(quality=80)),
        "another cut": make_plan(Rows(rows), options(samples_per_shard=3)),
        "a label": make_plan(Rows([row(0, label=1), *rows[1:]]), options()),
        "a place": make_plan(Rows([row(0, gps=None), *rows[1:]]), options()),
        "a rejected row": make_plan(Rows([*rows, row(1)]), options()),
        "a target": make_plan(Rows(rows), options(target_cities=["pittsburgh"])),
        "a split": make_plan(Rows(rows), options(val_fraction=0.3)),
    }
    newer = Rows(rows)
    newer.version = "2"
    changed["other bytes behind the rows"] = make_plan(newer, options())
    prints = {name: plan.fingerprint() for name, plan in changed.items()}
    assert base not in prints.values()
    assert len(set(prints.values())) == len(prints)


def test_a_shards_fingerprint_follows_its_own_photos_only() -> None:
    source, chosen = Rows([]), options()
    first, second = [entry(0), entry(1)], [entry(2), entry(3)]
    before = [fingerprint(part, source, chosen) for part in (first, second)]
    second[1].weight = 5.0
    after = [fingerprint(part, source, chosen) for part in (first, second)]
    assert before[0] == after[0] and before[1] != after[1]
    assert fingerprint(first[::-1], source, chosen) != before[0], "the order within a shard is part of its bytes"


def test_masks_of_one_photo_rebuild_its_shard_alone(tmp_path: Path) -> None:
    source, chosen = Rows([]), options(masks=str(tmp_path))
    before = [fingerprint([entry(i)], source, chosen) for i in range(3)]
    (tmp_path / "1.png").write_bytes(b"mask")
    after = [fingerprint([entry(i)], source, chosen) for i in range(3)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


ENTRIES = [entry(i) for i in range(700)]


@settings(max_examples=25)
@given(st.integers(1, 700), st.integers(0, 90))
def test_shards_of_a_split_are_nearly_equal_and_in_order(photos: int, size: int) -> None:
    entries = ENTRIES[:photos]
    shards = cut_shards(entries, Rows([]), options(samples_per_shard=size))
    counts = [len(shard.entries) for shard in shards]
    assert sum(counts) == photos and max(counts) - min(counts) <= 1
    assert max(counts) <= (size or 256)
    assert [e for shard in shards for e in shard.entries] == entries
    assert [shard.name for shard in shards] == [f"train-{i:06d}.tar" for i in range(len(shards))]


def test_the_cut_does_not_follow_the_number_of_processes() -> None:
    entries = [entry(i) for i in range(300)]
    one, many = (cut_shards(entries, Rows([]), options(processes=n)) for n in (1, 64))
    assert [shard.fingerprint for shard in one] == [shard.fingerprint for shard in many]
    with pytest.raises(UserError, match="--samples-per-shard must be 1 or more"):
        cut_shards(entries, Rows([]), options(samples_per_shard=-1))


def test_metadata_of_a_shard_hold_what_is_known_and_null_for_the_rest() -> None:
    known = meta_of(entry(1))
    assert (known["label"], known["latitude"], known["city"], known["gps_weight"]) == (1, 40.0, "pittsburgh", 1.0)
    bare = meta_of(Entry((0, 0, 0), Record("x"), "predict", "g"))
    assert all(bare[name] is None for name in ("label", "latitude", "longitude", "weather", "daytime", "scene"))
    json.dumps(bare, allow_nan=False)


# --------------------------------------------------------------------------------------------------- weights


def test_without_a_target_every_weight_is_one_and_it_says_so() -> None:
    plan = make_plan(Rows([row(i) for i in range(10)]), options())
    assert {entry.weight for entry in plan.entries} == {1.0}
    assert plan.target.description == {"kind": "no target", "transductive": False}
    assert plan.target.points.shape == (0, 2) and plan.target.centres.shape == (0, 2)


def test_a_target_of_cities_is_found_among_the_training_photos_in_any_case() -> None:
    entries = [entry(0, latitude=40.0), entry(1, latitude=41.0), entry(2, city="Munich", latitude=48.0)]
    points, words = target_points(entries, Rows([]), options(target_cities=[" PITTSBURGH ", "munich"]))
    assert points[:, 0].tolist() == [40.0, 41.0, 48.0]
    assert words["transductive"] is False and words["cities_from_test"] == words["cities_from_source"] == []


def test_cities_of_the_test_split_are_used_last_and_called_transductive() -> None:
    entries = [entry(0), entry(1, "test", city="Munich", latitude=48.0), entry(2, "test", latitude=1.0)]
    points, words = target_points(entries, Rows([]), options(target_cities=["munich", "pittsburgh"]))
    assert points[:, 0].tolist() == [48.0, 40.0], "pittsburgh's photo in test must not be looked at"
    assert words["transductive"] is True and words["cities_from_test"] == ["munich"]


def test_the_embedded_benchmark_knows_its_own_cities() -> None:
    source = Rows([], name="street:40")
    assert known_cities(Rows([])) == {} and "pittsburgh" in known_cities(source)
    points, words = target_points([entry(0, city="")], source, options(target_cities=["Pittsburgh"]))
    assert points.shape == (1, 2) and words["cities_from_source"] == ["Pittsburgh"]


def test_an_unknown_city_lists_those_that_are_there() -> None:
    entries = [entry(0, city="Lisbon"), entry(1, city="Ghent", latitude=None, longitude=None)]
    with pytest.raises(UserError, match="no photo with coordinates is in 'Ghent'; cities: Ghent, Lisbon"):
        target_points(entries, Rows([]), options(target_cities=["Ghent"]))
    with pytest.raises(UserError, match="cities: none named"):
        target_points([entry(0, city="")], Rows([]), options(target_cities=["Ghent"]))


def test_two_ways_to_say_the_target_are_refused() -> None:
    with pytest.raises(UserError, match="give one of them"):
        target_points([entry(0)], Rows([]), options(target_cities=["x"], target_gps="t.csv"))


def test_class_balance_comes_before_the_cap() -> None:
    weights, labels = np.array([5.0, 5.0, 0.3]), np.array([1, 1, 0])
    assert settle(weights, labels, "none", 2.0).tolist() == [2.0, 2.0, 0.3]
    assert settle(weights, labels, "keep", 0.0).tolist() == [1.0, 1.0, 1.0]
    assert settle(weights, labels, "keep", 0.5).tolist() == [0.5, 0.5, 0.5]
    for cap in (-1.0, math.nan):
        with pytest.raises(UserError, match="--weight-cap"):
            settle(weights, labels, "none", cap)


def test_only_training_photos_are_balanced() -> None:
    rows = [row(i, gps=[40.0, -80.0]) for i in range(12)]
    rows += [row(i, split="test", gps=[40.0, -80.0], **{"video_info.vid_id": f"t{i}"}) for i in range(20, 26)]
    plan = make_plan(Rows(rows), options(target_cities=["pittsburgh"], class_balance="keep", weight_cap=0.0))
    weights = {split: {e.weight for e in plan.entries if e.split == split} for split in ("train", "test")}
    assert weights == {"train": {1.0}, "test": {5.0}}


def test_what_the_manifest_says_of_weights_is_countable() -> None:
    entries = [entry(i, latitude=40.0 + (i % 3) * 3, label=(None, 0, 1)[i % 3]) for i in range(9)]
    latlon, labels = latlon_of(entries), labels_of(entries)
    assert labels.tolist() == [-1, 0, 1] * 3
    target = Target(latlon[:1], latlon[:1], {"kind": "file", "file": "t.csv", "transductive": False})
    weights = geo.weights_to_centres(latlon, target.centres)
    said = describe_weights(latlon, weights, labels, target, geo.DEFAULT, "none", 0.0)
    assert said["weights"] == {"0.3": 3, "1": 3, "5": 3} and said["target"]["points"] == 1
    assert said["class_prior"] == {"photos": 0.5, "draws": pytest.approx(0.3 / 1.3)}
    assert said["coverage"]["photos"] == 9 and said["coverage_unweighted"]["effective_sample_size"] == 9
    assert said["clusters"] == [[40.0, -80.0]]
    json.dumps(said, allow_nan=False)
    unknown = describe_weights(latlon, weights, np.full(9, -1), replace(target), geo.DEFAULT, "none", 0.0)
    assert unknown["class_prior"] == {"photos": None, "draws": None}
    many = describe_weights(latlon, np.arange(1.0, 10) / 7, labels, target, geo.DEFAULT, "none", 0.0)
    assert many["weights"] is not None and sum(many["weights"].values()) == 9


def test_photos_without_a_place_have_none() -> None:
    nowhere = entry(0, latitude=None, longitude=None)
    assert all(math.isnan(value) for value in nowhere.latlon())
    assert latlon_of([]).shape == (0, 2) and labels_of([]).shape == (0,)
