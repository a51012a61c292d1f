"""Photos named by a CSV: the spellings that people use, relative paths, stamps, and no path that breaks the build."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from roadwork.data.absent import if_there
from roadwork.data.sources import CsvSource, open_source, split_word
from roadwork.errors import UserError
from tests.data.photos import encode, scene


def source(folder: Path, text: str) -> CsvSource:
    path = folder / "photos.csv"
    path.write_bytes(text.encode())
    return CsvSource(str(path))


@pytest.fixture
def photo(tmp_path: Path) -> bytes:
    data = encode(scene(1))
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "deep" / "b c.jpg").write_bytes(data)
    return data


def test_paths_are_relative_to_the_file_and_may_be_absolute(tmp_path: Path, photo: bytes) -> None:
    rows = f"path,label\na.jpg,1\n deep/b c.jpg ,0\n{tmp_path}/a.jpg,1\n../{tmp_path.name}/a.jpg,0\n"
    made = source(tmp_path, rows)
    loaded = list(made.load([(0, 0, i) for i in range(4)]))
    assert [data == photo for _, data, _ in loaded] == [True] * 4
    assert [masks for *_, masks in loaded] == [None] * 4


@pytest.mark.parametrize("path", ["", ".", "deep", "absent.jpg", "a\0b.jpg", "x" * 5000])
def test_a_path_that_is_no_file_is_a_photo_without_bytes(tmp_path: Path, photo: bytes, path: str) -> None:
    made = source(tmp_path, "path,label\na.jpg,1\n")
    made.table[0]["path"] = path
    assert [data for _, data, _ in made.load([(0, 0, 0)])] == [b""]
    made.stamp((0, 0, 0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE])
def test_a_disk_that_fails_is_one_line_with_its_file(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError) as told, if_there("photo", tmp_path / "a.jpg"):
        raise OSError(number, os.strerror(number), str(tmp_path / "a.jpg"))
    assert f"photo {tmp_path}/a.jpg: cannot be read ({os.strerror(number)})" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_stamp_changes_with_the_file(tmp_path: Path, photo: bytes) -> None:
    made = source(tmp_path, "path\na.jpg\n")
    first = made.stamp((0, 0, 0))
    os.utime(tmp_path / "a.jpg", ns=(5, 5))
    second = made.stamp((0, 0, 0))
    (tmp_path / "a.jpg").unlink()
    assert len({first, second, made.stamp((0, 0, 0))}) == 3 and made.stamp((0, 0, 0)) == "missing"


def test_another_process_is_sent_the_paths_alone_and_loads_the_same(tmp_path: Path, photo: bytes) -> None:
    row = f'"deep/b c.jpg",1,{"a street with cones " * 50}\n'
    made = source(tmp_path, "path,label,description\n" + row * 1000)
    sent = pickle.dumps(made)
    again = pickle.loads(sent)
    assert len(sent) < 100_000 and (again.name, again.extra_columns) == (made.name, made.extra_columns)
    assert [data for _, data, _ in again.load([(0, 0, 999)])] == [photo]
    assert again.stamp((0, 0, 7)) == made.stamp((0, 0, 7)) != "missing"
    assert next(made.rows())[1]["scene_description"].startswith("a street with cones"), "the sender keeps all of it"


def test_half_a_coordinate_is_not_a_place(tmp_path: Path, photo: bytes) -> None:
    text = "path,label,latitude,longitude\na.jpg,1,40.5,\na.jpg,1,,\na.jpg,1,40.5,-80.25\n"
    records = list(open_source("csv:" + source(tmp_path, text).path))
    assert [record.latitude for record in records] == [None, None, 40.5]
    assert [record.repairs for record in records] == [("gps_not_a_pair",), ("gps_missing",), ()]


@pytest.mark.parametrize("name", ["city", "city_name", "City"])
def test_a_city_by_either_name(tmp_path: Path, photo: bytes, name: str) -> None:
    record = next(iter(open_source("csv:" + source(tmp_path, f"path,label,{name}\na.jpg,1,Ghent\n").path)))
    assert record.city == "Ghent"


def test_rows_that_are_short_or_long_are_read_as_far_as_they_go(tmp_path: Path, photo: bytes) -> None:
    made = source(tmp_path, "path,label,group\na.jpg\na.jpg,1,v1,surplus,more\n")
    rows = [row for _, row in made.rows()]
    assert [(row["label"], row["video_info.vid_id"]) for row in rows] == [("", ""), ("1", "v1")]


def test_what_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "photos.csv"
    path.write_bytes(b"path,label\nM\xfcnchen.jpg,1\n")
    with pytest.raises(UserError, match="not a CSV in UTF-8"):
        CsvSource(str(path))


def test_an_absent_file_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; give a CSV with the header path,label"):
        open_source(f"csv:{tmp_path}/absent.csv")


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("Train", "train"),
        (" VALIDATION ", "val"),
        ("valid", "val"),
        ("test", "test"),
        ("predict", "predict"),
        ("", None),
        (None, None),
    ],
)
def test_splits_by_any_of_their_names(word: str | None, split: str | None) -> None:
    assert split_word(word) == split


def test_a_split_that_there_is_not_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match="split 'dev' is unknown; allowed: train, val, test, predict or empty"):
        split_word("dev")


@pytest.mark.parametrize("spec", ["street:0", "street:-5", "street:many", "street:1.5"])
def test_a_number_of_drawn_photos_is_a_whole_one(spec: str) -> None:
    with pytest.raises(UserError, match="N in street:N is a whole number of photos, 1 or more"):
        open_source(spec)
