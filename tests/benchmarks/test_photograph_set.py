"""The list of photographs: labels from the repositories' own annotations, and what is left out."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.photograph_set import LEFT_OUT, SOURCES, main
from tests.data.photos import encode

STREET, STUDIO = np.full((40, 60, 3), 90, np.uint8), np.full((40, 60, 3), 250, np.uint8)
STUDIO[10:30, 20:40] = (200, 80, 20)


@pytest.fixture
def clones(tmp_path: Path) -> Path:
    """Every repository with a street photo of each of its classes, one before a white background, and one broken file."""
    for source in SOURCES:
        clone = tmp_path / source.name.split("/")[1]
        for folder in source.images:
            for number, (pixels, note) in enumerate(
                [(STREET, "0 .5 .5 .1 .1\n"), (STREET, ""), (STREET, "3 .5 .5 1 1")] * 2
            ):
                put(clone, folder, f"{number}.jpg", encode(pixels), note)
            put(clone, folder, "studio.jpg", encode(STUDIO), "0 .5 .5 .1 .1")
            put(clone, folder, "torn.jpg", b"no picture", "0 .5 .5 .1 .1")
    return tmp_path


def put(clone: Path, folder: str, name: str, photo: bytes, note: str) -> None:
    path = clone / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo)
    kind = "annotations" if "indian" in clone.name else "labels"
    beside = Path(str(path).replace("/images/", f"/{kind}/")).with_suffix(".txt")
    if beside.parent != path.parent:
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(note)


def listed(clones: Path) -> dict[str, str]:
    assert main([str(clones)]) == 0
    with (clones / "photos.csv").open(newline="") as file:
        return {row["path"]: row["label"] for row in csv.DictReader(file)}


def test_a_cone_in_the_annotation_makes_a_photo_positive(clones: Path) -> None:
    found = listed(clones)
    cones = {Path(p).name: label for p, label in found.items() if p.startswith("Cone-Detection")}
    assert cones == {"0.jpg": "1", "1.jpg": "0", "2.jpg": "0", "3.jpg": "1", "4.jpg": "0", "5.jpg": "0"}
    assert {v for p, v in found.items() if p.startswith("Segmentation")} == {"1"}, "work zones only"


def test_other_obstacles_are_negative_and_a_barricade_is_left_out(clones: Path) -> None:
    found = {p: label for p, label in listed(clones).items() if p.startswith("indian")}
    assert set(found.values()) == {"0"}
    assert {Path(p).name for p in found} == {"0.jpg", "4.jpg"}, "every second photo, without the class of barricades"


def test_what_was_left_out_by_eye_stays_out(clones: Path) -> None:
    for path in LEFT_OUT:
        for clone in ("Cone-Detection", "road_cone-detection-improved"):
            put(clones / clone, str(Path(path).parent), Path(path).name, encode(STREET), "")
    assert not {p for p in listed(clones) if p.split("/", 1)[1] in LEFT_OUT}


def test_a_clone_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2 and "git clone https://github.com/ikatsamenis/Cone-Detection" in capsys.readouterr().err
