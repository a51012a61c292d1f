"""The four commands: help, exit codes, and what verify, reweight and describe say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from roadwork.data.build import build
from roadwork.data.index import ShardIndex, read_manifest, update_index
from roadwork.data.plan import BuildOptions
from roadwork.data.verify import verify
from roadwork.data.views import view_boxes
from shards import build as build_cli
from shards import describe as describe_cli
from shards import reweight as reweight_cli
from shards import verify as verify_cli
from tests.data.photos import dataset

CLIS = [build_cli, describe_cli, reweight_cli, verify_cli]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    dataset(folder / "src", 24, 6)
    options = BuildOptions(str(folder / "src"), str(folder / "shards"), view_size=32, processes=1, samples_per_shard=6)
    build(options)
    return folder / "shards"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize("cli", CLIS)
def test_help(cli, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cli", "arguments"),
    [
        (build_cli, []),
        (build_cli, ["--source", "/absent", "--out", "{tmp}/o"]),
        (build_cli, ["--source", "/absent", "--out", "{tmp}/o", "--view-size", "518"]),
        (build_cli, ["--source", "/absent", "--out", "{tmp}/o", "--view-size", "large"]),
        (build_cli, ["--source", "/absent", "--out", "{tmp}/o", "--nonsense"]),
        (build_cli, ["--source", "/absent", "--out", "{tmp}/o", "--brackets", "50:5"]),
        (build_cli, ["--source", "x", "--out", "o", "--target-gps", "a", "--target-cities", "b"]),
        (verify_cli, ["/absent"]),
        (describe_cli, ["/absent", "--json"]),
        (reweight_cli, ["/absent", "--target-gps", "/absent.csv"]),
        (reweight_cli, ["/absent"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(cli, arguments, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stop:
        cli.main([a.replace("{tmp}", str(tmp_path)) for a in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [("200:1,50:2,inf:1", "rising distances"), ("50:-1,inf:1", "above 0"), ("a:1,inf:1", "give km:weight")],
)
def test_a_mistake_in_brackets_is_explained(words, named, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stop:
        build_cli.main(["--source", "/absent", "--out", "o", "--brackets", words])
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_a_lines_first_rate_is_not_that_of_photos_from_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    with build_cli.Lines() as lines:
        lines.show("encode", 10, 0, 860)
        lines.show("encode", 860, 0, 860)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "encode 10/860" and last.startswith("encode 860/860  ") and "images/s" in last


def test_build_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "src", 12, 3)
    target = tmp_path / "t.csv"
    target.write_text("latitude,longitude\n39.0,-86.0\n")
    arguments = ["--source", str(tmp_path / "src"), "--out", str(tmp_path / "out"), "--view-size", "32"]
    arguments += [
        "--processes",
        "1",
        "--target-gps",
        str(target),
        "--brackets",
        "50:3,inf:0.5",
        "--class-balance",
        "keep",
    ]
    assert build_cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "15 photos encoded, 0 kept" in said.out and "encode 15/15  " in said.err
    manifest = read_manifest(tmp_path / "out")
    assert manifest["brackets"] == {"max_km": [50.0], "weights": [3.0, 0.5]} and manifest["class_balance"] == "keep"
    assert manifest["class_prior"]["draws"] == pytest.approx(manifest["class_prior"]["photos"])
    assert build_cli.main(arguments) == 0
    assert "0 photos encoded, 15 kept" in capsys.readouterr().out


def test_describe(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe_cli.main([str(made), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_manifest(made)
    assert describe_cli.main([str(made)]) == 0
    text = capsys.readouterr().out
    for words in ("no target", "30 rows = 30 used + 0 rejected", "LEAKS: description", "groups in two splits: 0"):
        assert words in text


def test_verify_finds_nothing_in_what_was_built(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_cli.main([str(made), "--pixels"]) == 0
    assert "30 photos, no fault" in capsys.readouterr().out


def _altered_byte(folder: Path) -> str:
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def _truncated(folder: Path) -> str:
    path = folder / "val-000000.tar"
    path.write_bytes(path.read_bytes()[:-700])
    return path.name


def _missing(folder: Path) -> str:
    (folder / "test-000000.tar").unlink()
    return "test-000000.tar"


def _stranger(folder: Path) -> str:
    shutil.copy(folder / "train-000000.tar", folder / "train-000099.tar")
    return "train-000099.tar"


def _altered_index(folder: Path) -> str:
    path = next(folder.glob("train.index-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    return path.name


def _wrong_count(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["records"]["used"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "31 photos used, the shards hold 30"


def _no_rejected(folder: Path) -> str:
    (folder / "rejected.jsonl").unlink()
    return "rejected.jsonl"


def _index_tells_another_label(folder: Path) -> str:
    index = ShardIndex.open(folder, "train")
    update_index(folder, {"train": {"label": 1 - index.label}})
    return "label of"


def _index_tells_another_weight(folder: Path) -> str:
    index = ShardIndex.open(folder, "val")
    update_index(folder, {"val": {"gps_weight": index.gps_weight + 1}})
    return "gps_weight of"


def _torn_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-100])
    return "manifest.json"


@pytest.mark.parametrize(
    "fault",
    [
        _altered_byte,
        _truncated,
        _missing,
        _stranger,
        _altered_index,
        _wrong_count,
        _no_rejected,
        _index_tells_another_label,
        _index_tells_another_weight,
        _torn_manifest,
    ],
)
def test_verify_names_each_fault_and_exits_1(fault, copy: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    words = fault(copy)
    assert verify_cli.main([str(copy)]) == 1
    assert words in capsys.readouterr().out


def test_verify_names_every_fault_at_once(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [fault(copy) for fault in (_altered_byte, _truncated, _missing, _no_rejected)]
    assert verify_cli.main([str(copy)]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


def test_rebuild_from_the_tars_alone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = ShardIndex.open(copy, "train")
    (copy / "manifest.json").unlink()
    for path in copy.glob("*.npz"):
        path.unlink()
    assert verify_cli.main([str(copy), "--rebuild"]) == 0
    assert np.array_equal(ShardIndex.open(copy, "train").id, before.id)
    assert describe_cli.main([str(copy)]) == 0 and "rebuilt from the tars alone" in capsys.readouterr().out


@pytest.mark.parametrize("most", [1, 4, 9, 12])
def test_rebuild_finds_the_most_views_of_the_build_again(most: int, tmp_path: Path) -> None:
    """The largest number that cuts these photos as they are cut: photos of one shape leave a choice."""
    build(BuildOptions("street:24", str(tmp_path), view_size=64, processes=1, max_views=most, quality=60))
    assert verify_cli.main([str(tmp_path), "--rebuild"]) == 0
    index = ShardIndex.open(tmp_path, "train")
    shape = int(index.width[0]), int(index.height[0]), 64
    assert index.manifest["rebuilt_from_tars"] and most <= index.max_views
    assert len(view_boxes(*shape, index.max_views)) == len(view_boxes(*shape, most)) == index.num_views[0]
    assert index.max_views == 12 or len(view_boxes(*shape, index.max_views + 1)) > index.num_views[0]


def test_reweight_changes_index_and_manifest_and_not_the_tars(copy: Path, tmp_path: Path) -> None:
    tars = {path.name: path.read_bytes() for path in copy.glob("*.tar")}
    old = read_manifest(copy)
    assert old["target"]["kind"] == "no target"
    target = tmp_path / "t.csv"
    target.write_text("latitude,longitude\n39.0,-86.0\n39.1,-86.1\n")
    assert reweight_cli.main([str(copy), "--target-gps", str(target), "--brackets", "10:5,inf:0.5"]) == 0
    index = ShardIndex.open(copy, "train")
    assert set(index.gps_weight.tolist()) == {5.0, 0.5}
    assert {path.name: path.read_bytes() for path in copy.glob("*.tar")} == tars
    new = read_manifest(copy)
    assert new["reweighted"] is True and new["target"]["file"] == str(target) and len(new["clusters"]) == 2
    assert new["weights"] == {"5": int((index.gps_weight == 5).sum()), "0.5": int((index.gps_weight == 0.5).sum())}
    unchanged = set(old) - {"indexes", "target", "clusters", "brackets", "weights"}
    assert all(new[name] == old[name] for name in unchanged if not name.startswith(("coverage", "class")))
    assert verify(copy, pixels=True) == []
    assert index.read_meta(0)["gps_weight"] == 1.0


def test_building_again_after_a_reweight_gives_the_builds_weights(copy: Path, made: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.csv"
    target.write_text("latitude,longitude\n48.0,11.0\n")
    reweight_cli.main([str(copy), "--target-gps", str(target)])
    source = str(made.parent / "src")
    report = build(BuildOptions(source, str(copy), view_size=32, processes=1, samples_per_shard=6))
    assert report.encoded == 0 and not read_manifest(copy).get("reweighted")
    assert set(ShardIndex.open(copy, "train").gps_weight.tolist()) == {1.0}
