"""Garbage collection on the same steps everywhere."""

import gc
import weakref

import pytest

from roadwork.training.pace import GarbageCollection


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.self = self


def lost() -> "weakref.ref[Ring]":
    return weakref.ref(Ring())


def test_python_collects_only_on_the_agreed_steps():
    with GarbageCollection(3) as garbage:
        ring = lost()
        kept = [[] for _ in range(200_000)]  # more than enough for Python's own thresholds
        assert kept
        for step in (1, 2):
            garbage.after(step)
            assert ring() is not None, f"collected after step {step}"
        garbage.after(3)
        assert ring() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_error_gives_pythons_own_collection_back():
    with pytest.raises(KeyError), GarbageCollection(2):
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_leaves_python_alone():
    with GarbageCollection(0):
        assert gc.isenabled()
