"""Scanning a tar: what it finds, what it survives, and one clear line for everything that is not a whole shard."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from roadwork.data.scan import pack_rows, scan_shard, unpack_rows
from roadwork.data.shards import Sample, parse_shard_name, read_samples, shard_name, write_shard
from roadwork.errors import UserError
from tests.data.sheets import SIZE, sample

Members = list[tuple[str, bytes]]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "train-000000.tar"
    write_shard(path, (sample(i) for i in range(5)))
    return path


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def rewrite(path: Path, content: Members) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_rows_say_where_each_members_bytes_are(shard: Path) -> None:
    found, raw = scan_shard(shard), shard.read_bytes()
    inside = dict(members(shard))
    assert found.info.count == 5 == len(found.rows) and found.view_size == SIZE
    assert (found.info.name, found.info.split, found.info.bytes) == ("train-000000.tar", "train", len(raw))
    assert found.info.sha256 == hashlib.sha256(raw).hexdigest()
    for i, line in enumerate(found.rows):
        for suffix, field in ((".views.jpg", "views_at"), (".json", "meta_at"), (".masks.png", "masks_at")):
            offset, size = line[field]
            assert raw[offset : offset + size] == inside.get(f"{i:08d}{suffix}", b"")
        assert line["crc"] == zlib.crc32(inside[f"{i:08d}.views.jpg"])
        assert (line["id"], line["city"]) == (f"photo.{i}", "Ghent" if i % 2 else "")
        assert line["boxes"].dtype == np.float32 and line["boxes"].min() >= 0 and line["boxes"].max() <= 1
        assert line["masks_valid"] == ([True, False, True, True, False, True] if i % 3 == 0 else [False] * 6)


def test_what_was_found_survives_being_kept_as_json(shard: Path) -> None:
    found = scan_shard(shard)
    again = unpack_rows(pack_rows(found))
    assert again.info == found.info and again.view_size == found.view_size
    for one, other in zip(found.rows, again.rows, strict=True):
        assert np.array_equal(one["boxes"], other["boxes"]) and other["boxes"].dtype == np.float32
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in one.items() if name != "boxes"}
        assert plain == {name: v for name, v in other.items() if name != "boxes"}


def _without(suffix: str) -> Callable[[Members], Members]:
    return lambda content: [(name, data) for name, data in content if not name.startswith("00000002" + suffix)]


def _json(change: Callable[[dict], object]) -> Callable[[Members], Members]:
    def apply(content: Members) -> Members:
        made = []
        for name, data in content:
            if name == "00000002.json":
                meta = json.loads(data)
                replaced = change(meta)
                data = json.dumps(meta if replaced is None else replaced).encode()
            made.append((name, data))
        return made

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without(".views"), r"sample 00000002 has no 00000002\.views\.jpg"),
        (_without(".json"), r"sample 00000002 has no 00000002\.json"),
        (lambda c: [*c, ("00000009.txt", b"x")], r"sample 00000009 has no 00000009\.views\.jpg"),
        (lambda c: [*c, ("00000004.notes.txt", b"x")], r"unknown member 00000004\.notes\.txt"),
        (_json(lambda meta: meta.pop("group") and None), r"00000002\.json is not this version's \('group'\)"),
        (_json(lambda meta: meta.pop("views") and None), r"is not this version's \('views'\)"),
        (_json(lambda meta: [1, 2]), "is not this version's"),
        (_json(lambda meta: meta.update(view_size=64)), r"holds views of \[32, 64\] px; one size is allowed"),
        (lambda c: [(n, b"{" if n == "00000002.json" else d) for n, d in c], "is not this version's"),
        (lambda c: [], r"holds views of \[\] px"),
    ],
)
def test_a_shard_of_wrong_content_is_named_with_the_sample(
    shard: Path, change: Callable[[Members], Members], words: str
) -> None:
    rewrite(shard, change(members(shard)))
    with pytest.raises(UserError, match=words) as error:
        scan_shard(shard)
    assert str(shard) in str(error.value) and "build" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_shard_cut_anywhere_is_refused(shard: Path, share: float) -> None:
    whole = shard.read_bytes().rstrip(b"\0")  # the zeros at the end are padding
    shard.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="truncated|not a whole tar"):
        scan_shard(shard)


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, b"\0" * 100])
def test_what_is_no_tar_is_one_line(shard: Path, data: bytes) -> None:
    shard.write_bytes(data)
    with pytest.raises(UserError, match="train-000000.tar"):
        scan_shard(shard)


def test_a_missing_shard_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train-000003.tar is missing; build it again with `python -m shards.build`"):
        scan_shard(tmp_path / "train-000003.tar")


@pytest.mark.parametrize("name", ["train.tar", "train-1.tar", "holdout-000000.tar", "train-000000.tar.gz", "a/b.tar"])
def test_other_names_are_no_shards(name: str) -> None:
    with pytest.raises(UserError, match="is not a shard's name; shards are called like train-000000.tar"):
        parse_shard_name(name)


def test_names_of_shards_go_both_ways() -> None:
    for split in ("train", "val", "test", "predict"):
        for number in (0, 7, 999_999, 1_234_567):
            assert parse_shard_name(shard_name(split, number)) == (split, number)
    with pytest.raises(UserError, match="split 'dev' is unknown; use one of train, val, test, predict"):
        shard_name("dev", 0)


def test_samples_come_back_as_they_were_written(shard: Path) -> None:
    for i, read in enumerate(read_samples(shard)):
        written = sample(i)
        assert read.key == written.key and read.view_size == SIZE and isinstance(read.views, bytes)
        assert np.array_equal(read.boxes, written.boxes)
        assert {name: read.meta[name] for name in written.meta} == written.meta
        assert (read.masks is None) == (written.masks is None)


def test_a_sample_without_an_id_is_called_by_its_key(tmp_path: Path) -> None:
    plain: Sample = sample(1)
    del plain.meta["id"]
    path = tmp_path / "val-000000.tar"
    write_shard(path, [plain])
    assert scan_shard(path).rows[0]["id"] == "00000001"
