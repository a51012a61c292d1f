"""The grid of bucket sizes and overlap, and what the benchmark makes of its turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.buckets import AGAIN, BUCKETS, HELD, compared, settings, written
from roadwork.engine import CPU_CONFIG, GPU_CONFIG, read_ds_config

VARIED = ("overlap_comm", "reduce_bucket_size", "allgather_bucket_size")


def rest(found: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed file without what the benchmark varies."""
    return {**found, "zero_optimization": {k: v for k, v in found["zero_optimization"].items() if k not in VARIED}}


@pytest.mark.parametrize(("file", "gpu"), [(CPU_CONFIG, False), (GPU_CONFIG, True)])
def test_the_grid_holds_the_shipped_file_itself_and_others_that_the_engine_takes(
    tmp_path: Path, file: Path, gpu: bool
) -> None:
    shipped = read_ds_config(file)
    first, grid = settings(file, BUCKETS[gpu])
    assert grid[first] == shipped and len(grid) == 2 * (1 + len(BUCKETS[gpu]))
    seen = set()
    for name, content in grid.items():
        read = read_ds_config(written(tmp_path, name, content))
        assert rest(read) == rest(shipped)
        seen.add(tuple(read["zero_optimization"][key] for key in VARIED))
    assert len(seen) == len(grid)


def test_a_size_that_is_shipped_is_measured_once() -> None:
    size = read_ds_config(CPU_CONFIG)["zero_optimization"]["reduce_bucket_size"]
    assert len(settings(CPU_CONFIG, [size, size])[1]) == 2


def test_ratios_are_of_each_round_so_that_a_busy_machine_does_not_decide() -> None:
    held = [0.9, 7.2, 0.9]
    found = compared({"50": [1.0, 8.0, 1.0], AGAIN: [1.02, 8.0, 0.99], "2": [1.01, 8.08, 1.01], HELD: held}, "50")
    assert found["held"] == pytest.approx(0.9) and HELD not in found["ratio"], "no bucket, so not the fastest of them"
    assert found["ratio"] == {"50": 1.0, "2": 1.01} and found["noise"] == pytest.approx(0.02)
    assert found["fastest"] == "50" and found["shipped_within_noise"]


def test_a_setting_that_is_faster_by_more_than_noise_is_told() -> None:
    seconds = {"50": [1.0, 1.0, 1.0], AGAIN: [1.02, 0.97, 1.0], HELD: [1.0, 1.0, 1.0]}
    level = compared({**seconds, "2_overlap": [0.98, 0.99, 0.98]}, "50")
    assert level["fastest"] == "2_overlap" and level["shipped_within_noise"]
    beaten = compared({**seconds, "2_overlap": [0.9, 0.91, 0.8]}, "50")
    assert beaten["ratio"]["2_overlap"] == 0.9 and not beaten["shipped_within_noise"]
    assert (beaten["ratio_low"]["2_overlap"], beaten["ratio_high"]["2_overlap"]) == (0.8, 0.91)
