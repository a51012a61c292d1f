"""Two published splits may number their photos alike: neither may get the other's masks. And damage costs one photo."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from roadwork.data.index import ShardIndex, write_index
from roadwork.data.mask_files import PhotoMasks, write_masks
from roadwork.data.scan import scan_shard
from roadwork.data.shards import shard_name, write_shard
from roadwork.labelling.backend import Photo
from roadwork.labelling.source import ShardPhotos, SourcePhotos, repeated
from roadwork.labelling.update import update_masks
from tests.data.photos import row, write
from tests.data.sheets import sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train: photos 0, 1, 2; test: photos 2, 3 (another photo of the number 2)."""
    place = tmp_path / "shards"
    place.mkdir()
    scanned = []
    for split, numbers in (("train", [(0, "0"), (1, "1"), (2, "2")]), ("test", [(13, "2"), (14, "3")])):
        path = place / shard_name(split, 0)
        write_shard(path, [sample(i, masks=False, id=name) for i, name in numbers])
        scanned.append(scan_shard(path))
    write_index(place, scanned, {"note": "made by a test"})
    return place


def masks_for(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        bits = np.full((20, 20), 1, np.uint8)
        write_masks(folder, name, PhotoMasks(bits, (True,) * 6, (1.0,) + (0.0,) * 5, "a model", 20, 20))
    return folder


def test_ids_that_were_there_before_are_named_with_where() -> None:
    assert repeated([]) == {} and repeated(["a", "b"]) == {}
    assert repeated(["a", "b", "a", "a"]) == {
        2: "duplicate_id: a is position 0 as well",
        3: "duplicate_id: a is position 0 as well",
    }


def test_photos_of_shards_with_a_shared_id_are_labelled_once(folder: Path) -> None:
    photos = ShardPhotos(str(folder), tiles=False)
    assert photos.ids == ["0", "1", "2", "2", "3"]
    loaded = dict(photos.load(range(5)))
    assert loaded[3] == "duplicate_id: 2 is position 2 as well"
    assert all(isinstance(loaded[i], Photo) and loaded[i].id == photos.ids[i] for i in (0, 1, 2, 4))  # type: ignore[union-attr]


def test_masks_of_a_shared_id_go_to_neither_photo(folder: Path, tmp_path: Path) -> None:
    done = update_masks(folder, masks_for(tmp_path / "masks", "0", "2", "3"))
    assert (done.samples, done.changed, done.without) == (5, 2, 3)
    train, test = (ShardIndex.open(folder, split, verify=True) for split in ("train", "test"))
    has = {(s.split, str(s.id[i])): s.read_masks(i) is not None for s in (train, test) for i in range(len(s))}
    assert has == {
        ("train", "0"): True,
        ("train", "1"): False,
        ("train", "2"): False,
        ("test", "2"): False,
        ("test", "3"): True,
    }


def test_a_source_tells_the_same_of_its_rows(tmp_path: Path) -> None:
    from roadwork.data.sources import open_source

    rows = [row(1), row(2), row(2), row(3, label=7), row(3)]
    write(tmp_path / "train-0.parquet", rows)
    photos = SourcePhotos(open_source(str(tmp_path)).source, tiles=False)
    loaded = dict(photos.load(range(5)))
    assert photos.ids == ["1", "2", "2", "3", "3"]
    assert loaded[2] == "duplicate_id: 2 is position 1 as well" and str(loaded[3]).startswith("label_outside_0_1")
    assert loaded[4] == "duplicate_id: 3 is position 3 as well"
    assert all(isinstance(loaded[i], Photo) for i in (0, 1))


@pytest.mark.parametrize(("member", "data"), [("00000001.json", b"\xff"), ("00000001.views.jpg", b"\0\0")])
def test_a_damaged_photo_is_a_reason_and_the_next_one_is_labelled(folder: Path, member: str, data: bytes) -> None:
    path = folder / "train-000000.tar"
    with tarfile.open(path) as tar:
        at = tar.getmember(member).offset_data
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)
    loaded = dict(ShardPhotos(str(folder), tiles=False).load([0, 1, 2]))
    assert str(loaded[1]).startswith("unreadable: ") and "\n" not in str(loaded[1])
    assert isinstance(loaded[0], Photo) and isinstance(loaded[2], Photo)
