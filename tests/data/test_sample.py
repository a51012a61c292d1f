"""A sample of a source keeps the splits' shares, is spread over it, and touches few row groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from roadwork.data.sample import Row, sample


def rows(groups: list[int], split: str | None = "train", file: int = 0) -> list[Row]:
    """Rows of one file with row groups of these sizes."""
    return [((file, g, i), {"split": split, "id": (g, i)}) for g, size in enumerate(groups) for i in range(size)]


def taken(lines: list[Row], most: int) -> list[Row]:
    chosen, left_out = sample(lines, most)
    found = list(chosen)
    assert len(found) + left_out == len(lines)
    return found


def test_without_a_bound_nothing_is_read_ahead() -> None:
    lines = iter(rows([5]))
    assert sample(lines, 0) == (lines, 0) and next(lines)[0] == (0, 0, 0)


def test_every_split_has_its_share_and_the_order_is_the_sources() -> None:
    lines = [*rows([100] * 6), *rows([50] * 4, "test", 1), *rows([3], None, 2)]
    found = taken(lines, 80)
    assert Counter(line[1]["split"] for line in found) == {"train": 59, "test": 19, None: 1}
    assert found == [line for line in lines if line in found]
    assert found == taken(lines, 80), "the same rows each time"


def test_few_row_groups_are_touched_and_they_lie_apart() -> None:
    found = taken(rows([100] * 26), 250)
    assert sorted({ref[1] for ref, _ in found}) == [4, 13, 21]
    assert len(taken(rows([100] * 26), 100)) == 100


def test_a_table_whose_labels_are_sorted_gives_both() -> None:
    """One row group: the CSV that a folder per label makes."""
    found = [ref[2] for ref, _ in taken(rows([1000]), 10)]
    assert found == list(range(50, 1000, 100))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 120))
def test_as_many_as_asked_for_or_all(groups: list[int], most: int) -> None:
    lines: list[Any] = rows(groups)
    found = taken(lines, most)
    assert len(found) == min(most, len(lines)) and len({ref for ref, _ in found}) == len(found)
