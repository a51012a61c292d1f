"""Who labels what: parts, job arrays and processes split the photos without gaps and without doubles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from roadwork.config import Config
from roadwork.data.mask_files import PhotoMasks
from roadwork.errors import UserError
from roadwork.labelling.backend import Photo
from roadwork.labelling.crops import whole_photo
from roadwork.labelling.run import check, make_pseudo_masks
from roadwork.labelling.stage import Share, label_photos, units


def test_a_run_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = Config()
    config.run.dir, config.masks.model = str(tmp_path / "file" / "x"), "random-tiny"
    with pytest.raises(UserError, match=r"run\.dir .*file/x cannot be written: Not a directory"):
        make_pseudo_masks(config)


@dataclass
class Rank:
    """What the stage asks of the engine."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        return


def _array(task: int, first: int, count: int) -> dict[str, str]:
    return {
        "SLURM_ARRAY_TASK_ID": str(first + task),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(first + count - 1),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }


def _positions(share: Share) -> list[int]:
    return [p for i, unit in enumerate(units(103, 4)) if i % share.count == share.index for p in unit]


@pytest.mark.parametrize("first", [0, 1, 5])
def test_every_photo_is_one_processs(first: int) -> None:
    tasks, ranks = 4, 3
    by_array = [Share.of(Rank(r, ranks), _array(t, first, tasks)) for t in range(tasks) for r in range(ranks)]
    by_part = [Share.of(Rank(r, ranks), {}, f"{t + 1}/{tasks}") for t in range(tasks) for r in range(ranks)]
    assert by_part == by_array, "part I of N is task I of an array of N"
    assert sorted(p for share in by_part for p in _positions(share)) == list(range(103))


def test_a_part_comes_before_the_array() -> None:
    assert Share.of(Rank(0, 1), _array(3, 0, 4), "1/2") == Share(0, 2)
    assert Share.of(Rank(1, 2), {}) == Share(1, 2)
    assert Share.of(Rank(0, 1), _array(0, 7, 1)) == Share(0, 1), "an array of one task has all"


@pytest.mark.parametrize("part", ["0/4", "5/4", "2", "a/b", "-1/3", "1/0", "1/2/3"])
def test_an_impossible_part_is_refused_before_anything_starts(part: str) -> None:
    config = Config()
    config.masks.part = part
    with pytest.raises(UserError, match=r"masks.part is '.*'; it is I/N"):
        check(config.masks)


def test_an_array_with_gaps_is_refused() -> None:
    gaps = _array(0, 0, 4) | {"SLURM_ARRAY_TASK_MAX": "6"}
    with pytest.raises(UserError, match="--array=0-3"):
        Share.of(Rank(0, 1), gaps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"presence_threshold": 1.0}, "masks.presence_threshold is 1.0"),
        ({"box_threshold": -0.1}, "masks.box_threshold is -0.1"),
        ({"semantic": True, "backend": "grounded_sam"}, "masks.semantic takes SAM 3's map"),
        ({"compare": "/nowhere"}, "masks.compare /nowhere: no such folder"),
        ({"backend": "real"}, "give --masks.annotations"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, object], words: str) -> None:
    config = Config()
    for name, value in change.items():
        setattr(config.masks, name, value)
    with pytest.raises(UserError, match=words):
        check(config.masks)


class _Photos:
    """Photos that do not decode from `broken` on; a photo source."""

    def __init__(self, count: int, broken: int) -> None:
        self.ids = [f"p{i}" for i in range(count)]
        self.labels: list[int | None] = [None] * count
        self.broken = broken

    def load(self, positions: Sequence[int]) -> Iterator[tuple[int, Photo | str]]:
        for p in positions:
            photo = whole_photo(self.ids[p], np.zeros((16, 16, 3), np.uint8))
            yield p, "truncated_image" if p >= self.broken else photo


class _Knows:
    """A backend whose annotations know none of the photos."""

    origin = "annotations"

    def label(self, photos: Sequence[Photo]) -> list[PhotoMasks | None]:
        return [None] * len(photos)


@pytest.mark.parametrize("unknown", [0, 30])
def test_photo_after_photo_that_fails_ends_the_stage_only_where_none_was_answered(unknown: int, tmp_path: Path) -> None:
    photos = _Photos(unknown + 25, broken=unknown)
    if unknown:
        result = label_photos(photos, _Knows(), tmp_path, Share(0, 1))
        assert (result.without, len(result.failed), result.made) == (30, 25, 0)
    else:
        with pytest.raises(UserError, match="the first 20 photos all failed, the last with: truncated_image"):
            label_photos(photos, _Knows(), tmp_path, Share(0, 1))
