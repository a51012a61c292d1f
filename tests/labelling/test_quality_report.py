"""The quality report: what it finds in masks of known faults, and that the page shows all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from roadwork.config import Config, to_dict
from roadwork.data.mask_files import PhotoMasks, write_masks
from roadwork.evaluation.report import write_report
from roadwork.labelling.crops import whole_photo
from roadwork.labelling.quality import write_quality
from roadwork.labelling.source import Loaded

COUNT = 8
SIZE = (40, 60)


def _exact(position: int) -> np.ndarray:
    """Photos with roadwork (odd ones) have a cone on the left half."""
    bits = np.zeros(SIZE, np.uint8)
    bits[:, :30] = position % 2
    return bits


class Photos:
    """Grey photos with exact masks."""

    ids = [f"photo-{i}" for i in range(COUNT)]
    labels: list[int | None] = [i % 2 for i in range(COUNT)]

    def load(self, positions: Sequence[int]) -> Iterator[Loaded]:
        for i in positions:
            yield i, whole_photo(self.ids[i], np.full((*SIZE, 3), 90, np.uint8), _exact(i))


def _masks(bits: np.ndarray, cones: int) -> PhotoMasks:
    confidence = (0.9 if cones else 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return PhotoMasks(bits, (True,) * 6, confidence, "hand <b>", SIZE[1], SIZE[0], (cones, 0, 0, 0, 0, 0))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Masks that are exact but for photo 0: it is full of cones, and its label says that there is no roadwork."""
    for name in ("masks", "other"):
        (tmp_path / name / "about").mkdir(parents=True)
        for i in range(COUNT):
            write_masks(tmp_path / name, Photos.ids[i], _masks(_exact(i), i % 2))
    write_masks(tmp_path / "masks", "photo-0", _masks(np.ones(SIZE, np.uint8), 5))
    write_masks(tmp_path / "other", "photo-1", _masks(np.zeros(SIZE, np.uint8), 0))
    (tmp_path / "masks" / "about" / "summary.json").write_text(json.dumps({"failed": [{"id": "x"}]}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
    return tmp_path


def _text(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))


def test_the_page_says_how_far_the_masks_can_be_trusted(run: Path) -> None:
    found = write_quality(run / "masks", Photos(), run / "other")
    assert found["by_label"]["no_roadwork"]["share_with"]["cone"] == 0.25
    assert found["by_label"]["roadwork"]["share_with"]["cone"] == 1.0
    # Four halves are right; one whole photo is cone that shows none.
    assert found["exact"]["photos"] == COUNT and found["exact"]["classes"]["cone"]["iou"] == round(2 / 3, 4)
    # The other backend misses photo 1 and does not invent photo 0.
    assert found["agreement"]["classes"]["cone"]["iou"] == round(1.5 / 3, 4)
    assert [line["id"] for line in found["suspicious"]] == ["photo-0"]

    page = write_report(run)
    text = _text(page)
    for wanted in (
        "8 of 8 photos looked at have masks", "hand &lt;b&gt;", "1 photos failed", "cone 100.0 % 25.0 % – 0.667",
        "0.500", "1 photos without roadwork by their label are full of it", "photo-0: 5 objects (cone 5)",
        "Exact masks are known for 8", "Two backends labelled 8",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert re.search(r'<img src="data:image/jpeg[^"]+" alt="Photos with their masks">', page.read_text())


def test_masks_elsewhere_are_found_by_configuration_or_by_the_shards(run: Path, tmp_path: Path) -> None:
    write_quality(run / "masks", Photos())
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "No pseudo-masks were made" in _text(write_report(empty))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text(json.dumps({"masks_updated_from": str(run / "masks")}))
    assert "8 of 8 photos looked at" in _text(write_report(empty, shards=shards))
    config = Config()
    config.masks = replace(config.masks, out=str(run / "masks"))
    (empty / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    text = _text(write_report(empty))
    assert "8 of 8 photos looked at" in text and "No second backend was compared" in text
    (run / "masks" / "about" / "quality.json").write_text('{"by_label": {}}')
    assert "No pseudo-masks were made" in _text(write_report(empty)), "a damaged file does not stop the page"
