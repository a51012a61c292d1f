"""Who labels what: parts, job arrays and processes split the photos without gaps and without doubles."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from roadwork.config import Config
from roadwork.errors import UserError
from roadwork.labelling.run import check
from roadwork.labelling.stage import Share, units


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
