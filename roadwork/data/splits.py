"""Which photo is trained on, validated on, tested on: by group, so that no video or street corner is on two sides."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from roadwork.data.record import Record
from roadwork.errors import UserError

CELL_METRES = 100.0
_METRES_PER_DEGREE = 111_195.0


def gps_cell(latitude: float, longitude: float, metres: float = CELL_METRES) -> str:
    """Name of the square cell of about `metres` that holds a coordinate; longitude steps follow the row's latitude."""
    step = metres / _METRES_PER_DEGREE
    row = math.floor(latitude / step)
    width = step / max(math.cos(math.radians((row + 0.5) * step)), 1e-6)
    # +180 and -180 are the same meridian.
    column = math.floor(((longitude + 180.0) % 360.0) / width)
    return f"cell:{row}:{column}"


def group_of(record: Record) -> str:
    """Video, else 100 m GPS cell, else the photo itself."""
    if record.group:
        return record.group
    if record.latitude is not None and record.longitude is not None:
        return gps_cell(record.latitude, record.longitude)
    return f"photo:{record.split or ''}:{record.id}"


@dataclass
class Assignment:
    """split[i] of each record (None: rejected for reason[i])."""

    split: list[str | None]
    reason: list[str]


def assign_splits(
    records: Sequence[Record], groups: Sequence[str], val_fraction: float, test_fraction: float = 0.0, seed: int = 0
) -> Assignment:
    """Published splits are kept; val (and, where there is no test split, test) are carved from train by group.

    Unlabelled records go to `predict`. A train record whose group is in test or in val as published is rejected with
    `group_in_test` or `group_in_val`; a val record whose group is in test likewise. Fractions are shares of each
    class's photos in [0, 1), UserError for others.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0.0 <= value < 1.0:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0 and below 1; given {value}")
    split: list[str | None] = []
    for record in records:
        split.append("predict" if record.label is None else (record.split or "train"))
    reason = [""] * len(records)
    for stronger, weaker in (("test", ("train", "val")), ("val", ("train",))):
        held = {group for group, name in zip(groups, split, strict=True) if name == stronger}
        for i, present in enumerate(split):
            if present in weaker and groups[i] in held:
                split[i], reason[i] = None, f"group_in_{stronger}"
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        if fraction > 0.0 and name not in split:
            train = [i for i, s in enumerate(split) if s == "train"]
            for i in carve(
                [groups[i] for i in train], [int(records[i].label or 0) for i in train], fraction, seed, name
            ):
                split[train[i]] = name
    return Assignment(split, reason)


def carve(groups: Sequence[str], labels: Sequence[int], fraction: float, seed: int, name: str = "val") -> list[int]:
    """Indices of a held-out part of about `fraction` of each class, whole groups only.

    Groups are visited in the order of a keyed hash of their names and taken while that brings both class counts
    nearer to their share (stratified group sampling). The result depends on the groups' names, sizes and labels and on
    the seed, never on the order of the records. At least one group stays on each side; one group cannot be carved.
    """
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for group, label in zip(groups, labels, strict=True):
        counts[group][label] += 1
    if len(counts) < 2:
        return []
    total = np.maximum(sum(counts.values()), 1.0)
    order = sorted(counts, key=lambda g: hashlib.sha256(f"{name} {seed} {g}".encode()).digest())
    taken: set[str] = set()
    have = np.zeros(2)

    def error(value: np.ndarray) -> float:
        return float((((value / total) - fraction) ** 2).sum())

    for group in order:
        if error(have + counts[group]) < error(have) and len(taken) < len(counts) - 1:
            taken.add(group)
            have = have + counts[group]
    if not taken:
        taken = {min(order, key=lambda g: counts[g].sum())}
    return [i for i, group in enumerate(groups) if group in taken]


def leaking_groups(groups: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Groups that are in more than one of train, val and test; must be empty."""
    seen: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        if split != "predict":
            seen[group].add(split)
    return sorted(group for group, where in seen.items() if len(where) > 1)
