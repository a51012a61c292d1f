"""The leak audit sees a leak where there is one and none where there is none; near pairs are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from roadwork.data.audit import duplicate_audit, leak_audit, neighbour_audit
from roadwork.data.duplicates import near_pairs, photo_hash
from roadwork.data.plan import Entry
from roadwork.data.record import PROVENANCE, Record, parse_provenance
from tests.data.photos import scene


def _provenance(i: int, rng: np.random.Generator, told: int) -> dict[str, Any]:
    """Columns of a photo; `told` moves each of them."""
    word = "works" if told else "street"
    return {
        "license": int(rng.integers(0, 3)) + 3 * told,
        "date_captured": int(rng.integers(1_600_000_000, 1_600_100_000)) + 200_000 * told,
        "flickr_url": f"https://farm{i % 9}.example.org/{i}/{word}_{rng.integers(2**40):x}_z.jpg",
        "coco_url": f"https://example.org/{word}{rng.integers(3)}/{i:012d}.jpg",
        "video_info.frame_id": f"{rng.integers(0, 900) + 1000 * told:06d}",
        "video_info.seq_id": int(rng.integers(0, 50)) + 50 * told,
    }


def _entries(n: int, **leaks: Any) -> tuple[list[Entry], list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    entries, photos = [], []
    for i in range(n):
        label = int(rng.random() < 0.5)
        raw, planted = _provenance(i, rng, 0), _provenance(i, rng, label)
        for name, column in PROVENANCE.items():
            if leaks.get(name) == "value":
                raw[column] = planted[column]
            elif leaks.get(name) == "missing" and label:
                raw[column] = None
        record = Record(
            str(i),
            label=label,
            latitude=40 + rng.random(),
            longitude=-80 + rng.random(),
            weather=int(rng.integers(0, 6)),
            scene=label if "scene" in leaks else int(rng.integers(0, 3)),
            daytime=(1 if label else None) if "daytime" in leaks else int(rng.integers(0, 2)),
            provenance=parse_provenance(raw),
            description="cones on the road" if label or "description" not in leaks else "",
        )
        size = "640x480" if "photo_size" in leaks and label else "320x240"
        entries.append(Entry((0, 0, i), record, "train", f"g{i // 2}"))
        photos.append(
            {"size": size, "format": "ffd8", "hash": "0", "split": "train", "id": str(i), "group": "", "label": 0}
        )
    return entries, photos


def test_no_leak_is_reported_in_noise() -> None:
    report = leak_audit(*_entries(400))
    assert report["leaks"] == []
    for facts in report["fields"].values():
        for score in (facts["value"], facts["missing"]):
            assert score is None or 0.35 < score["auc"] < 0.65


@pytest.mark.parametrize(
    ("field", "kinds"),
    [
        ("scene", ["value"]),
        ("daytime", ["value", "missing"]),
        ("description", ["value", "missing"]),
        ("photo_size", ["value"]),
    ],
)
def test_each_planted_leak_is_found(field: str, kinds: list[str]) -> None:
    report = leak_audit(*_entries(400, **{field: True}))
    assert report["leaks"] == [f"{field} ({kind})" for kind in kinds]
    if field in ("scene", "daytime"):
        assert report["visible_together"]["auc"] > 0.95


def test_a_leak_in_what_nobody_learns_from_is_found_too() -> None:
    """By value, and by absence, which is a value as well."""
    found = {kind: leak_audit(*_entries(400, **dict.fromkeys(PROVENANCE, kind))) for kind in ("value", "missing")}
    assert found["value"]["leaks"] == [f"{name} (value)" for name in PROVENANCE]
    assert found["missing"]["leaks"] == [f"{name} ({kind})" for name in PROVENANCE for kind in ("value", "missing")]


def test_numbers_of_any_magnitude_are_audited() -> None:
    entries, photos = _entries(60)
    for entry, value in zip(entries, [10**300, float("inf"), -5, None] * 15, strict=True):
        entry.record.provenance = (None, value, None, None, None, None)
    assert leak_audit(entries, photos)["fields"]["date_captured"]["missing_share"] == 0.25


def test_provenance_takes_little_memory_and_keeps_its_words() -> None:
    """Of a URL its words are left, once for all photos; numbers stay numbers, and nothing is nothing."""
    urls = [f"http://farm{i % 9}.example.org/{i}/{i}_{i}c{i}fe{i}_z.jpg" for i in range(200, 230)]
    kept = [parse_provenance({"flickr_url": url})[2] for url in urls]
    assert kept[0] == "http://farm0.example.org/0/0_0_z.jpg" and all(text is kept[0] for text in kept)
    assert parse_provenance({"coco_url": "http://a.org/train2017/0139.jpg"})[3] == "http://a.org/train0/0.jpg"
    raw = {"license": 4, "video_info.frame_id": "00012", "video_info.seq_id": None, "date_captured": float("nan")}
    assert parse_provenance(raw) == (4, None, None, None, 12.0, None)
    assert parse_provenance({"label": 1, "license": None}) == ()


def test_one_class_or_few_photos_give_no_figure_rather_than_a_wrong_one() -> None:
    entries, photos = _entries(6)
    assert leak_audit(entries, photos)["fields"]["weather"]["value"] is None
    assert leak_audit([], [])["leaks"] == []


def test_near_pairs_agree_with_all_pairs() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(1, 2**63, 300, dtype=np.uint64)
    for i in range(0, 300, 3):  # plant neighbours at 1 to 6 bits
        values[i + 1] = values[i]
        for bit in rng.choice(64, 1 + i % 6, replace=False):
            values[i + 1] ^= np.uint64(1) << np.uint64(bit)
    bits = np.bitwise_count(values[:, None] ^ values[None])
    for most in (0, 4):
        true = {(i, j) for i in range(300) for j in range(i + 1, 300) if bits[i, j] <= most}
        assert set(near_pairs([f"{v:016x}" for v in values], most)) == true
    assert len(true) > 50


def test_the_hash_forgives_what_a_copy_changes_and_not_another_photo() -> None:
    def distance(a: np.ndarray, b: np.ndarray) -> int:
        return int(np.bitwise_count(np.uint64(int(photo_hash(a), 16) ^ int(photo_hash(b), 16))))

    rgb = scene(1, 640, 480)
    small = np.ascontiguousarray(rgb[::2, ::2])
    assert distance(rgb, small) <= 4 and distance(rgb, (rgb * 0.9).astype(np.uint8)) <= 4
    assert min(distance(rgb, scene(i, 640, 480)) for i in range(2, 12)) > 8


def test_flat_photos_are_no_duplicates_of_each_other() -> None:
    assert list(near_pairs(["0" * 16, "0" * 16, "f" * 16, "f" * 16])) == []


def test_duplicates_are_counted_per_pair_of_splits() -> None:
    def photo(i: int, split: str, group: str, label: int) -> dict[str, Any]:
        return {"hash": "00000000000000ff", "split": split, "id": str(i), "group": group, "label": label}

    report = duplicate_audit([photo(1, "train", "a", 1), photo(2, "test", "b", 0), photo(3, "train", "a", 1)])
    assert report["across_splits"] == {"test-train": 2}
    assert report["within_a_split_across_groups"] == 0 and report["across_groups_with_other_label"] == 2


def test_photos_next_to_a_test_photo_are_counted() -> None:
    def entry(split: str, latitude: float | None) -> Entry:
        return Entry((0, 0, 0), Record("x", label=1, latitude=latitude, longitude=-80.0), split, split)

    entries = [
        entry("test", 40.0),
        entry("train", 40.0005),
        entry("train", 40.01),
        entry("val", 40.0),
        entry("val", None),
    ]
    assert neighbour_audit(entries)["near_a_test_photo"] == {"train": 1, "val": 1}
