"""A source that breaks off in the middle of a build: one line, and what is finished stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from roadwork.data.build import build, encode
from roadwork.data.plan import BuildOptions, make_plan
from roadwork.data.sources import open_source
from roadwork.errors import UserError
from tests.data.photos import dataset, scene
from tests.data.photos import encode as encode_photo

FAILS = Path("/proc/self/mem")
"""Can be opened, and gives an I/O error when it is read."""


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def torn_page(path: Path) -> None:
    """The footer is whole, a page of pictures is not."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    at = min(column.data_page_offset for column in columns if column.path_in_schema == "image.bytes")
    data = bytearray(path.read_bytes())
    data[at - 40 : at + 40] = b"\xff" * 80
    path.write_bytes(data)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("fault", [truncated, torn_page, gone])
def test_a_source_that_breaks_after_planning_is_one_line_and_the_next_build_continues(
    tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    folder = dataset(tmp_path / "source", 24, 4)
    options = BuildOptions(str(folder), str(tmp_path / "out"), view_size=32, processes=1, samples_per_shard=4)
    (tmp_path / "out" / ".build").mkdir(parents=True)
    victim = folder / "data" / "test-00000-of-00001.parquet"
    source = open_source(options.source).source
    plan = make_plan(source, options)
    shutil.copy2(victim, tmp_path / "kept")
    fault(victim)
    with pytest.raises(
        UserError, match=r"test-00000-of-00001.parquet: cannot be read any more .*shards are kept"
    ) as told:
        encode(plan, source, options, 1, None)
    assert "\n" not in str(told.value)
    shutil.copy2(tmp_path / "kept", victim)  # the same times: the same source
    report = build(options)
    assert report.kept >= 8 and report.kept + report.encoded == 28


def test_a_source_that_breaks_while_it_is_listed_is_one_line(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "source", 12, 4)
    source = open_source(str(folder)).source
    truncated(folder / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet: cannot be read any more"):
        list(source.rows())


@pytest.mark.skipif(not FAILS.exists(), reason="a file whose bytes the system cannot give: Linux has one")
def test_a_photo_on_a_disk_that_fails_stops_the_build_and_one_that_is_absent_does_not(tmp_path: Path) -> None:
    """The share went away: no photo is dropped for it, and once it is back the same command continues."""
    names = [f"{number}.jpg" for number in range(12)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encode_photo(scene(number)))
    victim, listed = tmp_path / names[-1], tmp_path / "photos.csv"
    listed.write_text("path,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate([*names, "absent.jpg"])))
    options = BuildOptions(f"csv:{listed}", str(tmp_path / "out"), view_size=32, processes=1, samples_per_shard=4)
    shutil.move(victim, tmp_path / "kept")
    victim.symlink_to(FAILS)
    with pytest.raises(UserError) as told:
        build(options)
    assert str(victim) in str(told.value) and os.strerror(errno.EIO) in str(told.value)
    victim.unlink()
    shutil.move(tmp_path / "kept", victim)
    manifest = build(options).manifest
    assert manifest is not None and sum(split["photos"] for split in manifest["splits"].values()) == len(names)
    (rejection,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejection)["id"] == "absent.jpg"
