import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from roadwork.data.decode import Unreadable
from roadwork.data.index import ShardIndex, read_manifest, rebuild_index, update_index
from roadwork.data.ranges import RangeReader
from roadwork.data.shards import SCHEMA_VERSION
from roadwork.errors import UserError
from tests.data.sheets import SIZE, build, sample


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shards") / "made")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_columns_say_what_was_written(made: Path) -> None:
    index = ShardIndex.open(made, "train", verify=True)
    assert len(index) == 21 and index.view_size == SIZE and index.mask_size == SIZE // 4
    for i in range(21):
        written = sample(i)
        meta = written.meta
        assert (
            index.id[i] == meta["id"] == index.names([i])[0]
            and index.group[i] == meta["group"]
            and index.city[i] == meta["city"]
        )
        assert index.label[i] == (-1 if meta["label"] is None else meta["label"])
        assert index.weather[i] == (-1 if meta["weather"] is None else meta["weather"])
        assert index.scene[i] == -1 and index.daytime[i] == meta["daytime"]
        assert index.gps_weight[i] == meta["gps_weight"]
        if meta["latitude"] is None:
            assert np.isnan(index.latitude[i]) and np.isnan(index.longitude[i])
        else:
            assert (index.latitude[i], index.longitude[i]) == (meta["latitude"], meta["longitude"])
        assert index.num_views[i] == len(written.boxes)
        scale = np.asarray([meta["width"], meta["height"]] * 2)
        np.testing.assert_allclose(index.boxes(i), written.boxes / scale, rtol=1e-6)
        assert index.masks_valid[i].tolist() == meta.get("masks_valid", [False] * 6)


def test_byte_ranges_give_the_pixels(made: Path) -> None:
    index = ShardIndex.open(made, "val")
    for i in range(5):
        written = sample(1000 + i)
        views = index.read_views(i)
        assert views.shape == (len(written.boxes), 3, SIZE, SIZE)
        assert np.abs(views.transpose(0, 2, 3, 1).astype(int) - written.views).mean() < 4
        masks = index.read_masks(i)
        if written.masks is None:
            assert masks is None
        else:
            assert (masks == np.stack([written.masks >> k & 1 for k in range(6)], axis=1)).all()
        assert index.read_meta(i)["id"] == written.meta["id"]


def test_the_index_comes_back_from_the_tars_alone(folder: Path) -> None:
    before = {split: line["sha256"] for split, line in read_manifest(folder)["indexes"].items()}
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    after = rebuild_index(folder)
    assert {split: line["sha256"] for split, line in after["indexes"].items()} == before
    assert len(ShardIndex.open(folder, "train", verify=True)) == 21


def test_new_weights_appear_atomically_and_leave_the_tars(folder: Path) -> None:
    tars = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    weights = np.linspace(0.3, 5, 21)
    update_index(folder, {"train": {"gps_weight": weights}}, {"target": "elsewhere"})
    index = ShardIndex.open(folder, "train", verify=True)
    assert (index.gps_weight == weights).all() and index.manifest["target"] == "elsewhere"
    assert index.manifest["note"] == "made by a test"
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == tars
    assert len(list(folder.glob("*.npz"))) == 2


def test_a_kill_between_index_and_manifest_keeps_the_old_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def killed(source: str, target: str) -> None:
        if Path(target).name == "manifest.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        update_index(folder, {"train": {"gps_weight": np.full(21, 9.0)}})
    monkeypatch.undo()
    assert (ShardIndex.open(folder, "train", verify=True).gps_weight == 1 + np.arange(21) % 4).all()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def reversion(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["schema_version"] = SCHEMA_VERSION + 1
    path.write_text(json.dumps(manifest))


SHARD, MANIFEST, INDEX = "train-000001.tar", "manifest.json", "train.index-*.npz"
FAULTS: list[tuple[str, Callable[[Path], None], str, str]] = [
    (SHARD, Path.unlink, "missing", "shards.build"),
    (SHARD, truncate, "truncated", "shards.build"),
    (SHARD, flip, "altered", "shards.build"),
    (MANIFEST, Path.unlink, "missing", "--rebuild"),
    (MANIFEST, truncate, "truncated", "--rebuild"),
    (MANIFEST, reversion, f"schema version {SCHEMA_VERSION + 1}", "shards.build"),
    (INDEX, Path.unlink, "missing", "--rebuild"),
    (INDEX, truncate, "truncated", "--rebuild"),
    (INDEX, flip, "altered", "--rebuild"),
]


@pytest.mark.parametrize(("name", "fault", "word", "remedy"), FAULTS)
def test_a_broken_file_is_refused_in_one_line(
    folder: Path, name: str, fault: Callable[[Path], None], word: str, remedy: str
) -> None:
    path = next(folder.glob(name))
    fault(path)
    with pytest.raises(UserError) as caught:
        ShardIndex.open(folder, "train", verify=True)
    message = str(caught.value)
    assert path.name in message and word in message and remedy in message and "\n" not in message


def test_nothing_there_and_unknown_splits_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no shards at .*shards.build"):
        ShardIndex.open(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no split 'test'; it has: train, val"):
        ShardIndex.open(folder, "test")


@pytest.mark.parametrize("cut", [600, 1024, 1500, 4096])
def test_rebuilding_refuses_truncated_tars(folder: Path, cut: int) -> None:
    path = folder / SHARD
    os.truncate(path, path.stat().st_size - cut - 9000)
    with pytest.raises(UserError, match=f"{SHARD} is (truncated|not a whole tar)"):
        rebuild_index(folder)


def test_an_altered_sample_is_unreadable_without_verification(folder: Path) -> None:
    index = ShardIndex.open(folder, "train")
    with open(folder / "train-000000.tar", "r+b") as file:
        file.seek(int(index.views_offset[4] + index.views_size[4] // 2))
        file.write(b"\x55\xaa")
    with pytest.raises(Unreadable, match="CRC-32"):
        ShardIndex.open(folder, "train").read_views(4)


def test_ranges_reopen_what_they_closed(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 10)
    reader = RangeReader([tmp_path / str(i) for i in range(5)], max_open=2)
    for i in (0, 1, 2, 3, 4, 0, 4, 2):
        assert reader.read(i, 3, 4) == bytes([i]) * 4
    with pytest.raises(OSError, match="ends at byte 10, before byte 12"):
        reader.read(1, 8, 4)


def test_a_url_without_its_package_is_not_called_a_damaged_manifest() -> None:
    with pytest.raises(UserError, match="whose fsspec package is installed") as refused:
        read_manifest("nosuch://bucket/shards")
    assert "truncated" not in str(refused.value)


def test_training_holds_no_text(folder: Path) -> None:
    """Names are bytes or codes until somebody asks; as text they would be more than half of an index in memory."""
    index = ShardIndex.open(folder, "train")
    assert [name for name, v in vars(index).items() if isinstance(v, np.ndarray) and v.dtype.kind == "U"] == []


def test_a_remote_index_is_told_altered_from_truncated(folder: Path) -> None:
    (path,) = folder.glob("train.index-*.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is altered"):
        ShardIndex.open(f"file://{folder}", "train")
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="is truncated"):
        ShardIndex.open(f"file://{folder}", "train")
