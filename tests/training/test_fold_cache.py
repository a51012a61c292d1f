"""Chunks that folds share, as they lie on the disk and in the memory of a process."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from roadwork.training.fold_cache import CHUNK, PrefixCache


def test_a_map_holds_no_descriptor_and_what_was_written(tmp_path: Path) -> None:
    """A cache of a hundred thousand photos has more arrays than a process may hold files."""
    cache = PrefixCache(tmp_path, np.arange(3 * CHUNK), 2, torch.device("cpu"))
    draw = np.random.default_rng(0)
    photos = [
        {
            "x": draw.normal(size=(2, 3, 5)).astype(np.float32),
            "half": draw.normal(size=(2, 7)).astype(np.float16),
            "kept": draw.random((2, 3)) < 0.5,
            "ids": draw.integers(0, 9, 2),
            "none": np.zeros((2, 0, 4), np.float32),
        }
        for _ in range(CHUNK)
    ]
    for chunk in range(cache.number):
        cache._write(chunk, photos)
    before = len(os.listdir("/proc/self/fd"))
    maps = [cache._map(chunk) for chunk in range(cache.number)]
    assert len(os.listdir("/proc/self/fd")) == before
    for arrays in maps:
        assert arrays.keys() == photos[0].keys()
        for name, array in arrays.items():
            written = np.stack([photo[name] for photo in photos])
            assert array.dtype == written.dtype and np.array_equal(array, written), name
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_an_array_that_lies_by_columns_and_one_without_axes_are_mapped_as_they_are(tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path, np.arange(1), 1, torch.device("cpu"))
    cache.path(0).mkdir()
    columns = np.asfortranarray(np.arange(6).reshape(2, 3))
    np.save(cache.path(0) / "columns.npy", columns)
    np.save(cache.path(0) / "one.npy", np.array(2.5))
    maps = cache._map(0)
    assert np.array_equal(maps["columns"], columns) and maps["one"].shape == () and maps["one"] == 2.5
