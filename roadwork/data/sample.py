"""A part of a source for a first look: each published split in its share, spread over the source, from few row groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from roadwork.data.sources import Ref

T = TypeVar("T")
Row = tuple[Ref, dict[str, Any]]


def sample(rows: Iterable[Row], most: int) -> tuple[Iterable[Row], int]:
    """About `most` of a source's rows in their order, and how many are left out; all rows where `most` is 0.

    A row group is transferred up to its last chosen row, so each split takes the fewest row groups that hold its share,
    evenly spaced over the source, and evenly spaced rows of them: neighbours are often of one video or one label. At
    least one row of each split. What is chosen depends on the source's rows and `most` alone.
    """
    if not most:
        return rows, 0
    everything = list(rows)
    splits: dict[Any, list[Row]] = defaultdict(list)
    for line in everything:
        splits[line[1].get("split")].append(line)
    chosen = {
        ref
        for part in splits.values()
        for ref, _ in _spread(part, min(len(part), max(1, most * len(part) // len(everything))))
    }
    return [line for line in everything if line[0] in chosen], len(everything) - len(chosen)


def _spread(rows: Sequence[Row], number: int) -> list[Row]:
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for line in rows:
        groups[line[0][:2]].append(line)
    parts = list(groups.values())
    few = math.ceil(number / max(map(len, parts)))
    while sum(map(len, _evenly(parts, few))) < number:
        few += 1
    return _evenly([line for part in _evenly(parts, few) for line in part], number)


def _evenly(items: Sequence[T], number: int) -> list[T]:
    """`number` of the items in their order, at equal distances; number is 1 to len(items)."""
    return [items[len(items) * (2 * i + 1) // (2 * number)] for i in range(number)]
