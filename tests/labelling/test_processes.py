"""The stage in real processes: the same bytes on any number, nothing redone after a kill, failures named."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import Finished, Job, start

SCRIPT = "launch/pseudo_masks.py"
PHOTOS = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 40 photos; one is truncated, one id comes twice, one needs a safe file name."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(PHOTOS):
        rgb = cv2.resize(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8), (360, 200 + i))
        cv2.imwrite(str(folder / f"{i}.jpg"), rgb)
        lines.append({"path": f"{i}.jpg", "id": "a/b" if i == 7 else f"p{i}", "label": i % 2})
    data = (folder / "11.jpg").read_bytes()
    (folder / "11.jpg").write_bytes(data[: len(data) // 2])
    lines.append({"path": "3.jpg", "id": "p2", "label": 0})
    with open(folder / "photos.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "id", "label"])
        writer.writeheader()
        writer.writerows(lines)
    return folder / "photos.csv"


def _start(photos: Path, run: Path, processes: int, *extra: str) -> Job:
    return start(
        SCRIPT, f"--run.dir={run}", f"--masks.source=csv:{photos}", "--masks.model=random-tiny",
        "--masks.score_threshold=0.2", "--masks.batch=2", *extra, processes=processes,
    )  # fmt: skip


def _files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "masks").iterdir() if path.is_file()}


def _finish(job: Job) -> Finished:
    done = job.wait(600)
    assert done.status == 0, done.output[-3000:]
    return done


@pytest.mark.timeout(700)
def test_one_and_three_processes_and_a_kill_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    done = _finish(_start(photos, tmp_path / "one", 1))
    assert "randomly initialised" in done.output
    whole = _files(tmp_path / "one")
    assert len(whole) == 2 * (PHOTOS - 1), "two files for each photo but the truncated one"

    killed = tmp_path / "killed"
    job = _start(photos, killed, 3)
    deadline = time.monotonic() + 200
    while len(list((killed / "masks").glob("*.json"))) < 4:
        assert job.process.poll() is None, job.wait(1).output[-3000:]
        assert time.monotonic() < deadline, "no photo was labelled"
        time.sleep(0.01)
    job.kill()
    job.wait(60)
    kept = {p.name: p.stat().st_mtime_ns for p in (killed / "masks").glob("*.json")}
    before = len(kept)
    assert before < PHOTOS - 1, "the kill came too late to show anything"

    done = _finish(_start(photos, killed, 3))
    assert _files(killed) == whole
    for name, stamp in kept.items():
        assert (killed / "masks" / name).stat().st_mtime_ns == stamp, f"{name} was done before the kill and made again"
    summary = json.loads((killed / "masks" / "about" / "summary.json").read_text())
    assert summary["with_masks"] == PHOTOS - 1 and summary["processes"] == 3
    assert summary["labelled_now"] == PHOTOS - 1 - before
    assert [(entry["id"], entry["reason"]) for entry in summary["failed"]] == [("p11", "truncated_image")]
    quality = json.loads((killed / "masks" / "about" / "quality.json").read_text())
    assert quality["with_masks"] >= PHOTOS - 1 and (killed / "masks" / "about" / "quality.png").stat().st_size > 1000


@pytest.mark.timeout(300)
def test_missing_weights_end_in_one_line(photos: Path, tmp_path: Path) -> None:
    arguments = ["--masks.model=facebook/sam3", f"--masks.source=csv:{photos}", f"--run.dir={tmp_path}"]
    done = start(SCRIPT, *arguments, processes=2, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")).wait(600)
    assert done.status != 0
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert lines and len(set(lines)) == 1, done.output[-3000:]
    for part in ("facebook/sam3", "https://huggingface.co/facebook/sam3", "local folder", "random-tiny"):
        assert part in lines[0]
    assert 'masks.py", line' not in done.output, "a traceback of ours"
