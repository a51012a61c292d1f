"""New masks for built shards: in place, all or nothing, and nothing else changes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from roadwork.data.index import ShardIndex, read_manifest, update_index
from roadwork.data.mask_files import PhotoMasks, read_masks, write_masks
from roadwork.errors import UserError
from roadwork.labelling import update
from roadwork.labelling.source import ShardPhotos
from roadwork.labelling.update import finish_update, update_masks


@pytest.fixture
def built(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def masks(built: Path, tmp_path: Path) -> Path:
    """Left half cone for the first half of every split; one class invalid."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for split in read_manifest(built)["indexes"]:
        index = ShardIndex.open(built, split)
        for i in range(len(index) // 2):
            bits = np.zeros((72, 128), np.uint8)
            bits[:, :64] = 1
            valid = (True, True, True, True, True, False)
            made = PhotoMasks(bits, valid, (0.8, 0, 0, 0, 0, 0), "hand", int(index.width[i]), int(index.height[i]))
            write_masks(folder, str(index.id[i]), made)
    return folder


def test_masks_change_and_nothing_else(built: Path, masks: Path) -> None:
    weights = {s: np.arange(len(ShardIndex.open(built, s))) + 0.5 for s in read_manifest(built)["indexes"]}
    update_index(built, {split: {"gps_weight": values} for split, values in weights.items()})
    before = {split: ShardIndex.open(built, split) for split in weights}
    views = {split: index.read_views(0).copy() for split, index in before.items()}
    old_masks = {split: index.read_masks(len(index) - 1) for split, index in before.items()}
    done = update_masks(built, masks)
    assert done.samples == sum(map(len, before.values()))
    assert done.changed == sum(len(index) // 2 for index in before.values())
    for split, old in before.items():
        index = ShardIndex.open(built, split, verify=True)
        assert list(index.id) == list(old.id) and (index.gps_weight == weights[split]).all()
        assert (index.read_views(0) == views[split]).all()
        found = index.read_masks(0)
        assert found is not None and not found[:, 1:].any()
        width = index.mask_size // 2
        assert found[0, 0, :, : width - 1].all() and not found[0, 0, :, width + 1 :].any()
        assert index.masks_valid[0].tolist() == [True] * 5 + [False]
        assert index.read_meta(0)["masks_confidence"][0] == 0.8
        kept = index.read_masks(len(index) - 1)
        assert (kept is None) == (old_masks[split] is None) and (kept is None or (kept == old_masks[split]).all())
    assert sorted(p.name for p in built.glob(".masks*")) == []
    stamps = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    assert update_masks(built, masks).changed == 0, "the same again"
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == stamps, "nothing is written for it"


def _marked_real(masks: Path, built: Path, count: int) -> None:
    """Say of the first masks of the training split that people drew them."""
    for photo_id in ShardIndex.open(built, "train").id[:count]:
        found = read_masks(masks, str(photo_id))
        assert found is not None
        write_masks(masks, str(photo_id), replace(found, real=True))


def test_real_masks_stay_and_give_way_to_real_ones_only(built: Path, masks: Path) -> None:
    names = {line["name"]: line["sha256"] for line in read_manifest(built)["shards"]}
    for keep in ("all", "real"):
        done = update_masks(built, masks, keep)
        assert done.changed == 0 and done.kept > 0, "the street benchmark brings exact masks for every photo"
        assert {line["name"]: line["sha256"] for line in read_manifest(built)["shards"]} == names
    _marked_real(masks, built, 3)
    assert update_masks(built, masks, "real").changed == 3
    assert ShardIndex.open(built, "train").read_meta(0)["masks_origin"] == "hand"


def test_a_models_masks_give_way_and_a_photo_without_any_gets_them(built: Path, masks: Path) -> None:
    before = update_masks(built, masks)
    for photo_id in ShardIndex.open(built, "train").id[:2]:
        found = read_masks(masks, str(photo_id))
        assert found is not None
        write_masks(masks, str(photo_id), replace(found, bits=found.bits * 0, confidence=(0.0,) * 6))
    done = update_masks(built, masks, "real")
    assert (done.changed, done.kept) == (2, 0) and before.changed > 2
    empty = ShardIndex.open(built, "train").read_masks(0)
    assert empty is not None and not empty.any(), "an empty mask is there, and is empty"


def test_a_kill_among_the_renames_is_completed(built: Path, masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renames: list[str] = []
    real = os.replace

    def dying(source: str, target: str) -> None:
        if Path(target).parent == built and Path(source).parent.name == update.STAGING:
            renames.append(str(target))
            if len(renames) == 2:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(update.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        update_masks(built, masks)
    monkeypatch.undo()
    assert finish_update(built)
    for split in read_manifest(built)["indexes"]:
        index = ShardIndex.open(built, split, verify=True)
        found = index.read_masks(0)
        assert found is not None and not found[:, 1:].any()
    assert not finish_update(built)


def _update_and_die(built: Path, masks: Path, at: int) -> None:
    """In a process of its own: be killed just before the rename number `at`."""
    real, count = os.replace, [0]

    def dying(source: str, target: str) -> None:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = dying  # type: ignore[assignment]
    update_masks(built, masks)


def _contents(built: Path) -> dict[str, str]:
    return {line["name"]: line["sha256"] for line in read_manifest(built)["shards"]}


def test_killed_before_any_rename_the_shards_are_the_old_or_the_new_ones(
    built: Path, masks: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(built, tmp_path / "whole"))
    update_masks(whole, masks)
    old, new = _contents(built), _contents(whole)
    assert old != new
    seen, at, status = [], 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        at += 1
        folder = Path(shutil.copytree(built, tmp_path / f"killed-{at}"))
        process = multiprocessing.get_context("fork").Process(target=_update_and_die, args=(folder, masks, at))
        process.start()
        process.join(60)
        status = process.exitcode
        decided = finish_update(folder)
        assert _contents(folder) == (new if decided or status == 0 else old)
        for split in read_manifest(folder)["indexes"]:
            ShardIndex.open(folder, split, verify=True)
        seen.append(decided)
        update_masks(folder, masks)
        assert _contents(folder) == new and not list(folder.glob(".masks*")), "the next update ends as if nothing was"
        shutil.rmtree(folder)
    assert status == 0 and seen.count(True) >= 3 and seen.count(False) >= 3, "kills before and after the decision"


def test_damaged_masks_leave_the_shards_as_they_were(built: Path, masks: Path) -> None:
    before = {p.name: p.read_bytes() for p in built.iterdir() if p.is_file()}
    victim = sorted(masks.glob("*.png"))[-1]
    victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.raises(UserError, match="checksum"):
        update_masks(built, masks)
    assert {p.name: p.read_bytes() for p in built.iterdir() if p.is_file()} == before
    with pytest.raises(UserError, match="no such folder"):
        update_masks(built, masks / "nowhere")


def test_photos_of_shards_are_whole_or_all_views(built: Path) -> None:
    whole, tiles = ShardPhotos(str(built), False), ShardPhotos(str(built), True)
    assert len(whole.ids) == 40 and whole.ids == tiles.ids
    for (p, one), (q, many) in zip(whole.load([0, 39]), tiles.load([0, 39]), strict=True):
        assert p == q and not isinstance(one, str) and not isinstance(many, str)
        assert one.id == whole.ids[p] and (one.width, one.height) == (1280, 720)
        assert len(one.crops) == 1 and one.crops[0].box == (0, 0, 1280, 720)
        assert one.crops[0].rgb.shape == (36, 64, 3), "the view is brought back into the photo's shape"
        assert len(many.crops) > 1
