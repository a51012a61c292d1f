"""shards.build straight to a URL: the same bytes as on a disk, manifest last, continued by what is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from roadwork.data.build import build
from roadwork.data.index import MANIFEST, ShardIndex, read_manifest
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder
from roadwork.data.plan import BuildOptions
from roadwork.data.reweight import reweight
from roadwork.errors import UserError
from shards import verify as verify_cli
from tests.data.photos import dataset, row, write

SMALL: dict[str, Any] = {"view_size": 32, "processes": 1, "samples_per_shard": 5}
URL = "memory://bucket/shards"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = dataset(tmp_path_factory.mktemp("source"), 24, 4)
    write(folder / "data" / "train-00002-of-00002.parquet", [row(90, label=None), row(91, label=7)])
    return folder


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local")
    build(BuildOptions(str(source), str(out), **SMALL))
    return out


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def stored(url: str) -> dict[str, bytes]:
    """Files behind a URL, without those of the build itself."""
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    names = [line["name"] for line in files.ls(root, detail=True) if line["type"] == "file"]
    return {name.rpartition("/")[2]: files.cat_file(name) for name in names}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_several_processes_upload_what_a_local_build_writes(source: Path, local: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far/shards"
    report = build(BuildOptions(str(source), url, **(SMALL | {"processes": 2})))
    assert report.encoded == 29 and stored(url) == on_disk(local)
    assert b"label_outside_0_1" in stored(url)["rejected.jsonl"]
    near = ShardIndex.open(local, "train")
    far = ShardIndex.open(url, "train", cache_dir=str(tmp_path / "cache"), verify=True)
    options = {"global_batch": 6, "micro_batch": 6, "end_position": 24, "workers": 0}
    order = EndlessOrder(near.gps_weight, 0)
    for a, b in zip(TrainLoader(near, order, **options), TrainLoader(far, order, **options), strict=True):
        assert torch.equal(a.views, b.views) and a.ids == b.ids and not b.skipped


def test_a_second_build_uploads_nothing_and_a_lost_or_cut_shard_alone_is_built_again(source: Path) -> None:
    options = BuildOptions(str(source), URL, **SMALL)
    build(options)
    good = stored(URL)
    again = build(options)
    assert again.unchanged and again.encoded == 0
    files = fsspec.filesystem("memory")
    files.rm_file("/bucket/shards/train-000001.tar")
    files.pipe_file("/bucket/shards/test-000000.tar", good["test-000000.tar"][:-512])
    again = build(options)
    assert again.encoded == sum(
        line["count"]
        for line in read_manifest(URL)["shards"]
        if line["name"] in ("train-000001.tar", "test-000000.tar")
    )
    assert stored(URL) == good


def test_an_upload_that_fails_is_one_line_and_the_next_build_continues(
    source: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest comes last: until it is there, no reader takes the folder for shards."""
    real = MemoryFileSystem.pipe_file

    def refuse(self: MemoryFileSystem, path: str, value: bytes, **kwargs: Any) -> None:
        if path.endswith(MANIFEST):
            raise ConnectionResetError("the store hung up")
        real(self, path, value, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    options = BuildOptions(str(source), URL, **SMALL)
    with pytest.raises(UserError, match=r"memory://bucket/shards: the store hung up; .* finished shards are kept"):
        build(options)
    monkeypatch.undo()
    assert {*stored(URL), MANIFEST} == {*on_disk(local)}
    with pytest.raises(UserError, match="manifest.json is missing"):
        ShardIndex.open(URL, "train")
    report = build(options)
    assert report.encoded == 0 and report.kept == 29 and stored(URL) == on_disk(local)


def test_ranges_by_several_nodes_make_the_same_folder(source: Path, local: Path) -> None:
    for low, high in ((3, 99), (0, 3)):
        report = build(BuildOptions(str(source), URL, shard_range=(low, high), **SMALL))
        assert report.manifest is None and MANIFEST not in stored(URL)
    report = build(BuildOptions(str(source), URL, **SMALL))
    assert report.encoded == 0 and stored(URL) == on_disk(local)


def test_other_options_leave_nothing_of_the_old_build_and_weights_can_be_renewed(source: Path, tmp_path: Path) -> None:
    build(BuildOptions(str(source), URL, **(SMALL | {"samples_per_shard": 3})))
    many = len(stored(URL))
    build(BuildOptions(str(source), URL, **SMALL))
    assert len(stored(URL)) < many and len(list(fsspec.filesystem("memory").ls("/bucket/shards/.build"))) <= 2 * many
    (tmp_path / "t.csv").write_text("latitude,longitude\n39.05,-86.05\n")
    before = stored(URL)
    reweight(URL, str(tmp_path / "t.csv"))
    index = ShardIndex.open(URL, "train", cache_dir=str(tmp_path / "cache"))
    assert set(index.gps_weight.tolist()) == {5.0}  # every photo near the new target; they weighed 1
    after = stored(URL)
    assert {name for name in before if before[name] != after.get(name)} >= {MANIFEST}
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))


def test_shards_behind_a_url_are_verified_and_get_their_index_again(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What errors advise for a damaged index works where the shards are."""
    build(BuildOptions(str(source), URL, **SMALL))
    good = stored(URL)
    assert verify_cli.main([URL]) == 0 and "29 photos, no fault" in capsys.readouterr().out

    files = fsspec.filesystem("memory")
    index = next(name for name in good if name.startswith("train.index-"))
    files.pipe_file(f"/bucket/shards/{index}", good[index][:-9])
    with pytest.raises(
        UserError, match=f"index {URL}/{index} is truncated .*run `python -m shards.verify {URL} --rebuild`"
    ):
        ShardIndex.open(URL, "train")
    files.pipe_file("/bucket/shards/train-000001.tar", good["train-000001.tar"][:9000])
    files.rm_file("/bucket/shards/rejected.jsonl")
    assert verify_cli.main([URL]) == 1
    told = capsys.readouterr().out
    for words in (
        index,
        "train-000001.tar is not a whole tar",
        "train-000001.tar: its SHA-256",
        "rejected.jsonl: missing",
    ):
        assert f"{URL}/{words}" in told, told

    files.pipe_file("/bucket/shards/train-000001.tar", good["train-000001.tar"])
    files.rm_file(f"/bucket/shards/{MANIFEST}")
    with pytest.raises(UserError, match=f"run `python -m shards.verify {URL} --rebuild`"):
        ShardIndex.open(URL, "train")
    assert verify_cli.main([URL, "--rebuild"]) == 0
    assert stored(URL)[index] == good[index] and read_manifest(URL)["rebuilt_from_tars"] is True


def test_a_url_of_an_unknown_kind_is_refused_in_one_line(source: Path) -> None:
    with pytest.raises(UserError, match="nosuch://bucket: .*give a folder, or a URL") as caught:
        build(BuildOptions(str(source), "nosuch://bucket", **SMALL))
    assert "\n" not in str(caught.value)
