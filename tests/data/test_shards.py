import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset

from roadwork.data.decode import Unreadable, decode_views, encode_views
from roadwork.data.shards import read_samples, shard_name, write_shard
from roadwork.data.views import compose_sheet
from roadwork.errors import UserError
from tests.data.sheets import SIZE, build, sample


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    infos = [write_shard(tmp_path / d / shard_name("train", 3), map(sample, range(6))) for d in "ab"]
    assert infos[0] == infos[1]
    data = (tmp_path / "a" / infos[0].name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == infos[0].sha256 and len(data) == infos[0].bytes
    assert infos[0].count == 6 and infos[0].split == "train"


def test_webdataset_reads_every_shard(tmp_path: Path) -> None:
    folder = build(tmp_path)
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    assert len(paths) == 4
    number = 0
    for path in paths:
        for read in webdataset.WebDataset(path, shardshuffle=False).decode("rgb8"):
            expected = sample(int(read["__key__"]))
            boxes = read["json"]["views"]
            views = read["views.jpg"].reshape(len(boxes), SIZE, SIZE, 3)
            assert boxes == expected.boxes.tolist()
            assert np.abs(views.astype(int) - expected.views).mean() < 4
            assert ("masks.png" in read) == (expected.masks is not None)
            assert read["json"]["label"] == expected.meta["label"]
            number += 1
    assert number == 26


def test_views_do_not_bleed_into_each_other() -> None:
    for size in (32, 512):
        views = np.zeros((3, size, size, 3), dtype=np.uint8)
        views[1] = (255, 60, 0)
        decoded = decode_views(encode_views(compose_sheet(views)), 3, size).astype(int)
        assert decoded[0].max() == 0 and decoded[2].max() == 0
        assert np.abs(decoded[1] - [255, 60, 0]).max() <= 3


def test_members_are_plain_and_in_order(tmp_path: Path) -> None:
    write_shard(tmp_path / "test-000000.tar", map(sample, range(4)))
    with tarfile.open(tmp_path / "test-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:3]] == ["00000000.views.jpg", "00000000.json", "00000000.masks.png"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing():
        yield sample(0)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "train-000000.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_never_seen_half_written(tmp_path: Path) -> None:
    def watching():
        for i in range(3):
            assert not (tmp_path / "train-000000.tar").exists()
            yield sample(i)

    write_shard(tmp_path / "train-000000.tar", watching())
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "without dots"),
        ({"key": ""}, "without dots"),
        ({"boxes": np.zeros((3, 4), np.float32)}, r"views are uint8 \[3"),
        ({"meta": {"label": 1}}, "the metadata lack latitude"),
        ({"masks": np.zeros((1, 5, 5), np.uint8)}, r"masks are uint8 \[1, 8, 8\]"),
    ],
)
def test_bad_samples_are_refused_by_key(tmp_path: Path, change: dict, message: str) -> None:
    bad = sample(0)
    for name, value in change.items():
        setattr(bad, name, value)
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "train-000000.tar", [bad])


def test_masks_without_their_validity_are_refused(tmp_path: Path) -> None:
    bad = sample(0)
    del bad.meta["masks_valid"]
    with pytest.raises(ValueError, match="00000000: with masks, the metadata need masks_valid"):
        write_shard(tmp_path / "train-000000.tar", [bad])


def test_duplicate_keys_and_foreign_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        write_shard(tmp_path / "train-000000.tar", [sample(0), sample(0)])
    with pytest.raises(UserError, match="is not a shard's name"):
        write_shard(tmp_path / "training-0.tar", [sample(0)])
    with pytest.raises(UserError, match="use one of train, val, test, predict"):
        shard_name("dev", 0)


def test_rewriting_a_shard_keeps_its_pixels(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "train-000000.tar", map(sample, range(5)))
    second = write_shard(tmp_path / "train-000001.tar", read_samples(tmp_path / "train-000000.tar"))
    assert (first.sha256, first.bytes) == (second.sha256, second.bytes)


def test_nan_never_reaches_the_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_shard(tmp_path / "train-000000.tar", [sample(0, latitude=float("nan"))])


def test_altered_and_truncated_sheets_are_unreadable() -> None:
    data = encode_views(compose_sheet(sample(4).views))
    count = len(sample(4).views)
    import zlib

    crc = zlib.crc32(data)
    decode_views(data, count, SIZE, crc=crc)
    for broken in (data[: len(data) // 2], data[:100] + b"\x00" + data[101:], b"", b"no jpeg"):
        with pytest.raises(Unreadable):
            decode_views(broken, count, SIZE, crc=crc)
    for broken in (data[: len(data) // 2], b"", b"no jpeg"):
        with pytest.raises(Unreadable):
            decode_views(broken, count, SIZE)
    with pytest.raises(Unreadable, match="a sheet of 3 views"):
        decode_views(data, 3, SIZE)
    assert simplejpeg.is_jpeg(data)


def test_json_is_readable_by_anyone(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", [sample(3, description="Müllabfuhr, 工事")])
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        meta = json.load(io.TextIOWrapper(tar.extractfile("00000003.json"), encoding="utf-8"))
    assert meta["description"] == "Müllabfuhr, 工事" and meta["view_size"] == SIZE
