"""Masks in a real pipeline: labelled at full size, put into the shards, passed over when nothing changed."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from roadwork.config import Config
from roadwork.data.index import ShardIndex, read_manifest
from roadwork.pipeline import stages_of
from tests.launching import Job, environment

PHOTOS = 8


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(PHOTOS):
        rgb = cv2.resize(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8), (240, 160))
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), rgb)
        lines.append({"path": f"{i}.jpg", "id": f"p{i}", "label": i % 2, "split": "train"})
    with open(tmp_path / "photos.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return tmp_path / "photos.csv"


def _pipeline(photos: Path, run: Path, *extra: str) -> str:
    command = [
        sys.executable, "launch/pipeline.py", "--pipeline.stages=[shards, pseudo_masks]", f"--run.dir={run}",
        f"--data.shards={run / 'shards'}", f"--pipeline.source=csv:{photos}", "--pipeline.processes=1",
        '--pipeline.build=["--view-size", "64", "--val-fraction", "0", "--processes", "1"]',
        f"--masks.source=csv:{photos}", "--masks.model=random-tiny", "--masks.score_threshold=0.2", *extra,
    ]  # fmt: skip
    done = Job(command, environment()).wait(900)
    assert done.status == 0, done.output[-3000:]
    return done.output


@pytest.mark.timeout(1200)
def test_the_pipeline_puts_masks_into_the_shards_and_does_it_once(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _pipeline(photos, run)
    index = ShardIndex.open(run / "shards", "train", verify=True)
    assert len(index) == PHOTOS and index.masks_valid.all(), "each class was asked for in each photo"
    drawn = [index.read_masks(i) for i in range(PHOTOS)]
    assert all(masks is not None for masks in drawn) and any(masks.any() for masks in drawn if masks is not None)
    meta = index.read_meta(0)
    assert "randomly initialised" in meta["masks_origin"] and meta["masks_real"] is False
    assert read_manifest(run / "shards")["splits"]["train"]["with_masks"] == PHOTOS
    before = {path.name: path.stat().st_mtime_ns for path in (run / "shards").glob("*.tar")}

    said = _pipeline(photos, run)
    for stage in ("shards", "pseudo_masks", "shard_masks"):
        assert f"{stage}: done before, kept" in said
    (run / "stages" / "shard_masks.json").unlink()  # as a kill after the update and before its mark leaves it
    said = _pipeline(photos, run)
    assert "pseudo_masks: done before, kept" in said and "0 of 8 photos got new masks" in said
    assert json.loads((run / "stages" / "shard_masks.json").read_text())["digest"]
    assert {path.name: path.stat().st_mtime_ns for path in (run / "shards").glob("*.tar")} == before


def test_the_stage_that_fills_the_shards_follows_by_itself() -> None:
    config = Config()
    assert "shard_masks" not in stages_of(config)
    config.pipeline.stages = ["shards", "pseudo_masks", "pretrain"]
    assert stages_of(config) == ["shards", "pseudo_masks", "shard_masks", "pretrain"]
    config.pipeline.stages = ["shard_masks", "pretrain"]
    assert stages_of(config) == ["shard_masks", "pretrain"]
