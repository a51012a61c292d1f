"""A folder of shards in words: every figure that a person decides by is there, also where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from roadwork.data.describe import describe

COVERAGE: dict[str, Any] = {
    "photos": 90, "without_coordinate": 4, "effective_sample_size": 61.4, "unknown_draws": 0.02,
    "within_50_km": 0.5, "within_100_km": 0.625, "mean_km": 812.25, "targets_met": False,
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "shards": [{"bytes": 3 << 20}, {"bytes": 1 << 20}],
    "view_size": 512,
    "schema_version": 1,
    "records": {"read": 120, "used": 113, "used_as_they_are": 100, "used_repaired": 13, "rejected": 7},
    "source": {"spec": "natix", "extra_columns_ignored": ["camera", "notes"]},
    "repairs": {"gps_zero": 9, "image_greyscale": 4},
    "rejected_reasons": {"truncated_image": 7},
    "splits": {
        "train": {"photos": 90, "shards": 1, "groups": 40, "positive": 72, "prior": 0.8, "with_coordinate": 86,
                  "with_masks": 10},
        "predict": {"photos": 23, "shards": 1, "groups": 23, "positive": 0, "prior": None, "with_coordinate": 0,
                    "with_masks": 0},
    },
    "target": {"kind": "cities", "cities": ["pittsburgh", "Ghent"], "transductive": False, "points": 31},
    "clusters": [[40.4, -80.0], [51.0, 3.7]],
    "brackets": {"max_km": [50.0, 200.0, 500.0], "weights": [5.0, 2.5, 1.0, 0.3]},
    "class_balance": "keep",
    "class_prior": {"photos": 0.8, "draws": 0.7},
    "coverage": COVERAGE | {"within_50_km": 0.71, "mean_km": 120.5, "targets_met": True},
    "coverage_unweighted": COVERAGE,
    "coverage_targets": {"within_50_km": 0.70, "within_100_km": 0.85, "mean_km": 150.0},
    "leak_audit": {
        "rows": 90,
        "fields": {
            "gps": {"missing_share": 0.05, "value": {"auc": 0.61, "balanced_accuracy": 0.6}, "missing": None},
            "description": {"missing_share": 0.2, "value": None, "missing": {"auc": 0.99, "balanced_accuracy": 0.98}},
        },
        "visible_together": {"auc": 0.64, "balanced_accuracy": 0.6},
        "leaks": ["description (missing)"],
    },
    "near_duplicates": {"method": "imagehash.phash, 64 bits, at most 4 differ", "across_splits": {"test-train": 2}},
    "neighbours": {"near_a_test_photo": {"train": 3, "val": 1}},
    "groups_in_two_splits": [],
}  # fmt: skip


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(MANIFEST) | changes


def test_every_figure_is_told() -> None:
    text = describe(MANIFEST)
    for words in (
        "2 shards, 4.0 MiB, views of 512 px, schema version 1",
        "source natix: 120 rows = 113 used + 7 rejected",
        "used as they are 100, repaired 13",
        "repairs: gps_zero 9, image_greyscale 4",
        "rejected: truncated_image 7",
        "extra columns, ignored: camera, notes",
        "target: cities pittsburgh, Ghent; 31 points, 2 clusters",
        "class balance keep",
        "class prior of train: photos 0.800, draws 0.700",
        "effective sample size 61 of 90; targets met: True",
        "leak audit on 90 training photos",
        "LEAKS: description (missing)",
        "near-duplicates across splits (imagehash.phash, 64 bits, at most 4 differ): test-train 2",
        "within 100 m of a test photo: train 3, val 1",
        "groups in two splits: 0",
    ):
        assert words in text, words
    assert "TRANSDUCTIVE" not in text and "reweighted" not in text


def test_each_split_has_a_line_and_nothing_is_shown_as_a_number_where_there_is_none() -> None:
    lines = {line.split()[0]: line.split() for line in describe(MANIFEST).splitlines() if line.strip()}
    assert lines["train"] == ["train", "90", "1", "40", "72", "0.800", "86", "10"]
    assert lines["predict"] == ["predict", "23", "1", "23", "0", "-", "0", "0"]
    assert lines["gps"][1:] == ["0.050", "0.610", "-"]
    assert lines["description"][1:] == ["0.200", "-", "0.990"]


def test_coverage_stands_beside_its_targets() -> None:
    lines = {line.split()[0]: line.split()[1:] for line in describe(MANIFEST).splitlines() if "_km" in line}
    assert lines["within_50_km"] == ["0.500", "0.710", "0.700"]
    assert lines["mean_km"] == ["812.250", "120.500", "150.000"]


@pytest.mark.parametrize(
    ("changes", "words", "absent"),
    [
        ({"target": {"kind": "file", "file": "t.csv", "transductive": False, "points": 2}}, "target: file t.csv; 2", ""),
        (
            {"target": {"kind": "no target", "transductive": False, "points": 0}, "clusters": [],
             "coverage": COVERAGE | {"mean_km": None}},
            "coverage: no target",
            "targets met",
        ),
        ({"coverage": COVERAGE | {"mean_km": None}}, "coverage: no training photo has a usable coordinate", ""),
        (
            {"target": MANIFEST["target"] | {"transductive": True, "cities_from_test": ["Ghent"]}},
            "TRANSDUCTIVE: coordinates of the test split for Ghent",
            "",
        ),
        ({"reweighted": True}, "reweighted after the build: the index holds the weights", ""),
        ({"near_duplicates": MANIFEST["near_duplicates"] | {"across_splits": {}}}, "at most 4 differ): none", ""),
        ({"leak_audit": MANIFEST["leak_audit"] | {"leaks": []}}, "LEAKS: none", ""),
        ({"leak_audit": MANIFEST["leak_audit"] | {"visible_together": None}}, "visible together", ""),
        ({"class_prior": {"photos": None, "draws": None}}, "photos -, draws -", ""),
        ({"repairs": {}, "rejected_reasons": {}}, "120 rows", "repairs:"),
        ({"source": {"spec": "csv:x", "extra_columns_ignored": []}}, "source csv:x", "extra columns"),
    ],
)  # fmt: skip
def test_what_a_folder_may_lack_is_said_or_left_out(changes: dict[str, Any], words: str, absent: str) -> None:
    text = describe(changed(**changes))
    assert words in text
    assert not absent or absent not in text


def test_an_index_made_again_from_the_tars_says_what_is_not_known() -> None:
    bare = {name: MANIFEST[name] for name in ("shards", "view_size", "schema_version")}
    text = describe(bare)
    assert "index rebuilt from the tars alone: source, audits and coverage are not known" in text
    assert "target" not in text and "leak" not in text
