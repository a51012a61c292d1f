"""shards.build from a source to a manifest: nothing lost, nothing doubled, the same bytes however it was run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from roadwork.data.build import build
from roadwork.data.describe import describe
from roadwork.data.index import ShardIndex
from roadwork.data.plan import BuildOptions
from roadwork.data.reweight import reweight
from roadwork.data.splits import leaking_groups
from roadwork.data.verify import verify
from roadwork.errors import UserError
from tests.data.photos import dataset, encode, row, scene, write

SMALL: dict[str, Any] = {"view_size": 32, "processes": 1, "samples_per_shard": 5}


def make(source: Path | str, out: Path, **changes: Any) -> dict[str, Any]:
    manifest = build(BuildOptions(str(source), str(out), **(SMALL | changes))).manifest
    assert manifest is not None
    return manifest


def rejected(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line["id"]: line["reason"] for line in lines}


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("source"), 36, 8)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    make(source, out, target_cities=["pittsburgh"])
    return out


def test_every_record_is_there_once_and_test_is_whole(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    indexes = {split: ShardIndex.open(built, split) for split in ("train", "val", "test")}
    ids = [i for index in indexes.values() for i in index.id.tolist()]
    assert sorted(ids, key=int) == [str(i) for i in [*range(36), *range(1000, 1008)]]
    assert sorted(indexes["test"].id.tolist()) == [str(i) for i in range(1000, 1008)]
    assert 2 <= len(indexes["val"]) <= 9
    groups = [(g, s) for s, index in indexes.items() for g in index.group.tolist()]
    assert leaking_groups([g for g, _ in groups], [s for _, s in groups]) == []
    assert manifest["records"] == {"read": 44, "used": 44, "used_as_they_are": 44, "used_repaired": 0, "rejected": 0}
    assert manifest["splits"]["test"]["prior"] == 0.5
    assert verify(built, pixels=True) == []


def test_metadata_and_pixels_arrive(built: Path) -> None:
    index = ShardIndex.open(built, "train")
    i = 3
    original, meta = row(int(index.id[i])), index.read_meta(i)
    assert meta["label"] == original["label"] == index.label[i]
    assert f"[{meta['latitude']}, {meta['longitude']}]" == original["gps"]
    assert (meta["width"], meta["height"], meta["city"]) == (96, 64, original["city_name"])
    whole = cv2.resize(scene(int(index.id[i])), (32, 32), interpolation=cv2.INTER_AREA)
    found = index.read_views(i)[0].transpose(1, 2, 0)
    assert np.abs(found.astype(int) - whole.astype(int)).mean() < 12


def test_the_manifest_says_what_the_contract_names(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert {"shards", "splits", "clusters", "brackets", "coverage", "class_prior", "schema_version"} <= set(manifest)
    assert {"sha256", "bytes", "count", "name"} <= set(manifest["shards"][0])
    assert manifest["target"]["cities"] == ["pittsburgh"] and manifest["target"]["transductive"] is False
    fields = manifest["leak_audit"]["fields"]
    assert fields["description"]["missing"]["auc"] == 1.0 and fields["gps"]["missing"]["auc"] == 0.5
    assert "description (missing)" in manifest["leak_audit"]["leaks"]
    assert "travel_alteration (missing)" in manifest["leak_audit"]["leaks"]


def test_two_processes_write_the_same_bytes_and_a_second_build_redoes_nothing(
    source: Path, built: Path, tmp_path: Path
) -> None:
    make(source, tmp_path, target_cities=["pittsburgh"], processes=2)
    assert tars(tmp_path) == tars(built)
    assert (tmp_path / "manifest.json").read_bytes() == (built / "manifest.json").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    report = build(BuildOptions(str(source), str(tmp_path), target_cities=["pittsburgh"], **SMALL))
    assert report.unchanged and report.encoded == 0 and report.kept == 44
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}


def test_a_killed_build_continues(source: Path, built: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "shards.build",
        "--source",
        str(source),
        "--out",
        str(tmp_path),
        "--view-size",
        "32",
    ]
    command += ["--samples-per-shard", "5", "--processes", "2", "--target-cities", "pittsburgh"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".build").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    victim = next((tmp_path / ".build").glob("*.json"))
    (tmp_path / ".train-000000.tar.1.tmp").write_bytes(b"torn")
    report = build(BuildOptions(str(source), str(tmp_path), target_cities=["pittsburgh"], **SMALL))
    assert report.kept >= 1 and victim.exists()
    assert tars(tmp_path) == tars(built)
    assert not list(tmp_path.glob(".*.tmp")) and verify(tmp_path) == []


def test_a_damaged_shard_is_built_again_and_the_others_are_kept(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path)
    good = tars(tmp_path)
    damaged = bytearray(good["train-000001.tar"])
    damaged[2000] ^= 1
    (tmp_path / "train-000001.tar").write_bytes(damaged)
    report = build(BuildOptions(str(source), str(tmp_path), **SMALL))
    assert 0 < report.encoded <= 5 and tars(tmp_path) == good


def test_other_options_leave_nothing_of_the_old_build(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path, samples_per_shard=3)
    many = len(tars(tmp_path))
    make(source, tmp_path, samples_per_shard=20)
    assert len(tars(tmp_path)) < many and verify(tmp_path, pixels=True) == []


def test_the_most_views_of_a_photo_are_known_to_the_index(source: Path, built: Path, tmp_path: Path) -> None:
    make(source, tmp_path, max_views=2)
    assert [ShardIndex.open(folder, "train").max_views for folder in (tmp_path, built)] == [2, 12]


def test_a_sample_is_said_to_be_one_can_be_continued_and_another_size_is_another_build(
    source: Path, built: Path, tmp_path: Path
) -> None:
    manifest = make(source, tmp_path, max_photos=22)
    assert manifest["records"]["read"] == 22 and manifest["source"]["rows_left_out"] == 22
    assert manifest["splits"]["test"]["photos"] == 4 and "A SAMPLE by --max-photos: 22" in describe(manifest)
    small = tars(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / min(small)).unlink()  # as if it had been killed before its last shard
    report = build(BuildOptions(str(source), str(tmp_path), max_photos=22, **SMALL))
    assert 0 < report.encoded <= 5 and report.kept == 22 - report.encoded and tars(tmp_path) == small
    assert build(BuildOptions(str(source), str(tmp_path), max_photos=22, **SMALL)).unchanged
    whole = make(source, tmp_path, target_cities=["pittsburgh"])
    assert "rows_left_out" not in whole["source"] and tars(tmp_path) == tars(built) and verify(tmp_path) == []


def test_ranges_of_shards_make_the_same_folder(source: Path, built: Path, tmp_path: Path) -> None:
    for low, high in [(4, 99), (0, 4)]:
        options = BuildOptions(
            str(source), str(tmp_path), target_cities=["pittsburgh"], shard_range=(low, high), **SMALL
        )
        assert (build(options).manifest is None) == (low == 4 or high == 4)
    report = build(BuildOptions(str(source), str(tmp_path), target_cities=["pittsburgh"], **SMALL))
    assert report.encoded == 0 and tars(tmp_path) == tars(built)


def test_bad_records_are_rejected_by_name_and_counts_add_up(tmp_path: Path) -> None:
    rows = [row(i) for i in range(24)]
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:900]
    rows[3]["label"] = 5
    rows[4]["id"] = 0
    rows[5]["gps"] = "[0, 0]"
    rows[6]["gps"] = "[-120.0, 40.0]"
    rows[7]["scene_level_tags.weather"] = "['Hail']"
    rows[8]["image"]["bytes"] = encode(np.asarray(Image.fromarray(scene(8)).convert("L")))
    rows[9]["video_info.vid_id"] = "held"
    rows[10]["label"] = None
    rows[11]["image"] = None
    write(tmp_path / "src" / "train-0.parquet", rows)
    test = [row(i, **{"video_info.vid_id": name}) for i, name in [(0, "t1"), (1, "t2"), (50, "held")]]
    write(tmp_path / "src" / "test-0.parquet", test)
    manifest = make(tmp_path / "src", tmp_path / "out", val_fraction=0.2)
    assert rejected(tmp_path / "out") == {
        "2": "truncated_image",
        "3": "label_outside_0_1: 5",
        "0": "duplicate_id",
        "9": "group_in_test",
        "11": "no_image",
    }
    assert manifest["rejected_reasons"]["duplicate_id"] == 1
    assert sorted(ShardIndex.open(tmp_path / "out", "test").id.tolist()) == ["0", "1", "50"]
    records = manifest["records"]
    assert records["read"] == 27 == records["used"] + records["rejected"]
    assert records["rejected"] == len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert records["used"] == records["used_as_they_are"] + records["used_repaired"]
    assert manifest["repairs"]["gps_swapped"] == 1 and manifest["repairs"]["weather_unrecognised"] == 1
    assert manifest["repairs"]["gps_zero"] == 1 and manifest["repairs"]["image_greyscale"] == 1
    assert ShardIndex.open(tmp_path / "out", "predict").id.tolist() == ["10"]
    assert verify(tmp_path / "out", pixels=True) == []


def test_a_number_that_is_unlabelled_in_two_published_splits_is_asked_for_once(tmp_path: Path) -> None:
    """Predictions are told apart by id: twice the same one could never be written."""
    write(tmp_path / "src" / "train-0.parquet", [row(i, label=None if i == 3 else i % 2) for i in range(8)])
    write(tmp_path / "src" / "test-0.parquet", [row(3, label=None), row(100), row(101, label=None)])
    manifest = make(tmp_path / "src", tmp_path / "out", val_fraction=0.0)
    assert sorted(ShardIndex.open(tmp_path / "out", "predict").id.tolist()) == ["101", "3"]
    assert rejected(tmp_path / "out") == {"3": "duplicate_id_in_predict"}
    assert manifest["records"]["read"] == 11 == manifest["records"]["used"] + 1
    assert verify(tmp_path / "out", pixels=True) == []


def test_a_source_without_one_good_photo_says_so(tmp_path: Path) -> None:
    write(
        tmp_path / "src.parquet", [row(1, image={"bytes": b"x", "path": ""}), row(3, image={"bytes": b"y", "path": ""})]
    )
    with pytest.raises(UserError, match="no photo could be decoded"):
        make(tmp_path / "src.parquet", tmp_path / "out")
    write(tmp_path / "src.parquet", [row(1, label=9)])
    with pytest.raises(UserError, match="label_outside_0_1"):
        make(tmp_path / "src.parquet", tmp_path / "out")


def _mask(bits: np.ndarray) -> bytes:
    return encode(Image.fromarray(bits), "PNG")


def test_exact_masks_of_full_and_quarter_size_arrive_in_the_views(tmp_path: Path) -> None:
    bits = np.zeros((256, 384), np.uint8)
    bits[128:, 192:] = 0b000001
    bits[:64] |= 0b100000
    photos = [encode(scene(i, 384, 256)) for i in range(4)]
    masks = [_mask(bits), _mask(bits[::4, ::4]), _mask(bits.T), None]
    rows = [row(i, image={"bytes": photos[i], "path": ""}) | {"masks": masks[i]} for i in range(4)]
    write(tmp_path / "train.parquet", rows)
    manifest = make(tmp_path / "train.parquet", tmp_path / "out", val_fraction=0.0, view_size=64)
    assert manifest["repairs"] == {"masks_wrong_shape": 1}
    assert manifest["splits"]["train"]["with_masks"] == 2
    index = ShardIndex.open(tmp_path / "out", "train")
    assert index.masks_valid.tolist() == [[True] * 6] * 2 + [[False] * 6] * 2
    for i in (0, 1):
        views = index.read_masks(i)
        assert views is not None and views.shape[1:] == (6, 16, 16)
        assert views[0, 0, 8:, 8:].all() and not views[0, 0, :8].any() and not views[0, 0, :, :8].any()
        assert views[0, 5, :4].all() and not views[0, 5, 4:].any() and not views[0, 1:5].any()
    assert np.array_equal(index.read_masks(0), index.read_masks(1))


def test_a_folder_of_masks(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row(1), row(2)])
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "1.png").write_bytes(_mask(np.full((64, 96), 2, np.uint8)))
    facts = {"masks_valid": [False, True] + [False] * 4, "masks_confidence": [0, 0.75, 0, 0, 0, 0]}
    (tmp_path / "masks" / "1.json").write_text(json.dumps(facts))
    make(tmp_path / "train.parquet", tmp_path / "out", val_fraction=0.0, masks=str(tmp_path / "masks"))
    index = ShardIndex.open(tmp_path / "out", "train")
    assert index.masks_valid[0].tolist() == facts["masks_valid"]
    assert index.read_meta(0)["masks_confidence"] == facts["masks_confidence"]
    assert index.read_masks(1) is None
    (tmp_path / "masks" / "2.png").write_bytes(_mask(np.full((64, 96), 1, np.uint8)))
    make(tmp_path / "train.parquet", tmp_path / "out", val_fraction=0.0, masks=str(tmp_path / "masks"))
    assert ShardIndex.open(tmp_path / "out", "train").read_masks(1) is not None


def test_weights_follow_the_target(source: Path, tmp_path: Path) -> None:
    rows = [row(i, gps=gps) for i, gps in enumerate(["[40.44, -79.99]", "[41.5, -81.7]", "[48.1, 11.6]", None])]
    write(tmp_path / "train.parquet", rows)
    (tmp_path / "t.csv").write_text("latitude,longitude\n40.44,-79.99\n")
    manifest = make(tmp_path / "train.parquet", tmp_path / "out", val_fraction=0.0, target_gps=str(tmp_path / "t.csv"))
    assert ShardIndex.open(tmp_path / "out", "train").gps_weight.tolist() == [5.0, 2.5, 0.3, 1.0]
    assert manifest["coverage"]["within_50_km"] == pytest.approx(5 / 7.8)
    plain = make(tmp_path / "train.parquet", tmp_path / "plain", val_fraction=0.0)
    assert plain["target"]["kind"] == "no target" and plain["weights"] == {"1": 4}


def test_a_file_of_the_test_splits_places_is_called_transductive(source: Path, tmp_path: Path) -> None:
    """Half of the file are places of test photos, half of training photos, as `tests.data.photos.row` has them."""
    target = tmp_path / "t.csv"
    places = [(39.0 + i * 0.01, -86.0 - i * 0.01) for i in (*range(1000, 1004), 0, 1, 2, 3)]
    target.write_text("latitude,longitude\n" + "".join(f"{a:.6f},{b:.6f}\n" for a, b in places))
    manifest = make(source, tmp_path / "out", target_gps=str(target))
    assert manifest["target"]["transductive"] is True and manifest["target"]["share_from_test"] == 0.5
    assert "(TRANSDUCTIVE: 50.0% of its points are places of the test split alone)" in describe(manifest)
    reweighted = reweight(tmp_path / "out", str(target))
    assert reweighted["target"] == manifest["target"]

    target.write_text("latitude,longitude\n39.0,-86.0\n48.0,11.0\n")
    for said in (make(source, tmp_path / "out", target_gps=str(target)), reweight(tmp_path / "out", str(target))):
        assert said["target"] == {"kind": "file", "file": str(target), "transductive": False, "points": 2}


def test_a_city_that_only_test_has_is_called_transductive(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [row(i, city_name="here") for i in range(4)])
    write(tmp_path / "test-0.parquet", [row(i, city_name="there") for i in range(100, 104)])
    manifest = make(tmp_path, tmp_path / "out", target_cities=["Here", "there"])
    assert manifest["target"]["transductive"] is True and manifest["target"]["cities_from_test"] == ["there"]
    assert make(tmp_path, tmp_path / "two", target_cities=["here"])["target"]["transductive"] is False
    with pytest.raises(UserError, match="'nowhere'; cities: here, there"):
        make(tmp_path, tmp_path / "three", target_cities=["nowhere"])


def test_near_duplicates_across_splits_are_found_and_can_be_grouped(tmp_path: Path) -> None:
    for i in range(12):
        picture = scene(i // 2, 256, 192)  # each photo comes twice, once a little darker
        (tmp_path / f"{i}.jpg").write_bytes(encode((picture * (0.95 if i % 2 else 1.0)).astype(np.uint8)))
    lines = [f"{i}.jpg,{(i // 2) % 2},{'test' if i == 1 else 'train'}" for i in range(12)]
    (tmp_path / "p.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n")
    spec = f"csv:{tmp_path / 'p.csv'}"
    audit = make(spec, tmp_path / "out", val_fraction=0.0)["near_duplicates"]
    assert audit["across_splits"] == {"test-train": 1}
    assert audit["examples"] == [["test:1.jpg", "train:0.jpg"]] or audit["examples"] == [["train:0.jpg", "test:1.jpg"]]
    grouped = make(spec, tmp_path / "grouped", val_fraction=0.3, group_near_duplicates=True)
    assert grouped["near_duplicates"]["across_splits"] == {}
    assert rejected(tmp_path / "grouped") == {"0.jpg": "group_in_test"}


def test_csv_with_test_fraction(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(encode(scene(i)))
    (tmp_path / "p.csv").write_text(
        "path,label\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(20)) + "absent.jpg,1\n"
    )
    spec = f"csv:{tmp_path / 'p.csv'}"
    manifest = make(spec, tmp_path / "out", val_fraction=0.2, test_fraction=0.2)
    assert set(manifest["splits"]) == {"train", "val", "test"} and manifest["splits"]["test"]["photos"] == 4
    assert rejected(tmp_path / "out") == {"absent.jpg": "no_image"}
    first = ShardIndex.open(tmp_path / "out", "test").id.tolist()
    make(spec, tmp_path / "other", val_fraction=0.2, test_fraction=0.2, seed=1)
    assert first != ShardIndex.open(tmp_path / "other", "test").id.tolist()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"view_size": 518}, "518 is not a multiple of 16"),
        ({"quality": 0}, "quality must be 1 to 100"),
        ({"max_views": 13}, "max-views must be 1 to 12"),
        ({"val_fraction": -0.1}, "val-fraction"),
        ({"masks": "/absent"}, "no such folder"),
        ({"target_gps": "a.csv", "target_cities": ["b"]}, "one of them"),
        ({"shard_range": (3, 1)}, "shard-range"),
        ({"max_photos": -1}, "max-photos must be 1 or more, or 0 for all; given -1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(
    source: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word) as caught:
        make(source, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)


def test_masks_that_do_not_belong_to_the_photo_are_not_used(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [row(i) for i in (1, 2, 3)])
    write(tmp_path / "test-0.parquet", [row(3, **{"video_info.vid_id": "other"})])
    masks = tmp_path / "masks"
    masks.mkdir()
    png = _mask(np.full((64, 96), 2, np.uint8))
    for name, crc in (("1", zlib.crc32(png)), ("2", 17), ("3", zlib.crc32(png))):
        (masks / f"{name}.png").write_bytes(png)
        (masks / f"{name}.json").write_text(json.dumps({"crc32": crc}))
    manifest = make(tmp_path, tmp_path / "out", val_fraction=0.0, masks=str(masks))
    assert manifest["repairs"] == {"masks_ambiguous_id": 2, "masks_damaged": 1} and manifest["ids_in_two_splits"] == 2
    assert ShardIndex.open(tmp_path / "out", "train").masks_valid.any(axis=1).tolist() == [True, False, False]


def test_the_street_benchmark_is_drawn_once_and_has_masks_and_a_target(tmp_path: Path) -> None:
    manifest = make("street:24", tmp_path, view_size=64, target_cities=["greensburg", "lisbon"], samples_per_shard=0)
    assert manifest["splits"]["test"]["with_masks"] == manifest["splits"]["test"]["photos"] > 0
    assert manifest["records"]["used"] == 24 and manifest["source"]["extra_columns_ignored"] == []
    assert sum(part["with_coordinate"] for part in manifest["splits"].values()) > 12
    assert not manifest["target"]["transductive"] and len(manifest["clusters"]) >= 2
    assert verify(tmp_path, pixels=True) == []
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "source").iterdir()}
    report = build(BuildOptions("street:24", str(tmp_path), target_cities=["greensburg", "lisbon"], view_size=64))
    assert report.unchanged and files == {path: path.stat().st_mtime_ns for path in (tmp_path / "source").iterdir()}


def test_a_full_disk_is_one_line_and_the_next_build_continues(source: Path, built: Path, tmp_path: Path) -> None:
    # A limit on the size of files stands for a full disk: the write of a shard fails half-way.
    program = (
        "import resource, signal, sys; from shards.build import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY)); main(sys.argv[1:])"
    )
    arguments = ["--source", str(source), "--out", str(tmp_path), "--view-size", "32", "--samples-per-shard", "5"]
    arguments += ["--processes", "1", "--target-cities", "pittsburgh"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == 2 and "no space left" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.tar*")) and not list(tmp_path.glob(".*.tmp"))
    make(source, tmp_path, target_cities=["pittsburgh"])
    assert tars(tmp_path) == tars(built)


def test_a_killed_worker_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from roadwork.data import build as module

    def killed(*_: Any) -> None:
        raise BrokenProcessPool("A child process terminated abruptly")

    monkeypatch.setattr(module, "encode", killed)
    with pytest.raises(UserError, match="fewer --processes"):
        make(source, tmp_path)
