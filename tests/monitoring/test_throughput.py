"""Operations, utilisation and rank statistics by hand."""

import mmap
from pathlib import Path

import pytest

from roadwork.monitoring import throughput


def test_operations_of_vit_h_plus_are_the_measured_ones():
    per_view = throughput.view_operations(parameters=840_510_000, tokens=1029, depth=32, width=1280)
    assert per_view == pytest.approx(1.90e12, rel=0.005)
    assert throughput.training_operations(per_view) == pytest.approx(5.71e12, rel=0.005)


def test_pruning_after_block_4_saves_29_percent_and_after_the_last_nothing():
    full = throughput.pruned_operations(1.0, 12, 12, 4, 32)
    assert full == 12
    assert 1 - throughput.pruned_operations(1.0, 12, 8, 4, 32) / full == pytest.approx(0.2917, abs=1e-4)
    assert throughput.pruned_operations(1.0, 12, 8, -1, 32) == full
    with pytest.raises(ValueError, match="cannot keep 13 of 12"):
        throughput.pruned_operations(1.0, 12, 13, 4, 32)


def test_a_frozen_backbone_is_only_run_forward():
    assert throughput.training_operations(10.0, 0.0) == 10.0
    assert throughput.training_operations(10.0, 0.25) == 15.0


def test_utilisation_reproduces_a_measured_row():
    # 72.8 views/s of ViT-H+ training against 797 TFLOP/s: 0.521 in the project's measurements
    per_view = throughput.training_operations(throughput.view_operations(840_510_000, 1029, 32, 1280))
    assert throughput.utilisation(72.8 * per_view, 1.0, 797e12) == pytest.approx(0.521, abs=0.002)
    assert throughput.utilisation(1.0, 0.0, 1.0) == 0.0


def test_slowest_rank():
    assert throughput.slowest_rank([1.0, 1.0, 3.0, 1.0]) == (2, 3.0, 3.0)
    assert throughput.slowest_rank([0.0]) == (0, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least one rank"):
        throughput.slowest_rank([])


def test_meter_gives_a_window_and_starts_anew():
    meter = throughput.Meter()
    assert meter.read() == {}
    meter.add(images=32, seconds=2.0, data_wait_s=0.5)
    meter.add(images=32, seconds=2.0, data_wait_s=0.1)
    figures = meter.read()
    assert figures == pytest.approx({"images_per_s": 16, "step_s": 2, "data_wait_s": 0.3, "data_wait_share": 0.15})
    assert meter.read() == {}


def test_memory_is_that_of_the_process():
    before = throughput.memory_gib()  # the largest so far, which other tests of this process may have set
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    room = int(before * 2**30) - resident
    with mmap.mmap(-1, room + 256 * 2**20) as block:
        block[:: mmap.PAGESIZE] = b"x" * len(block[:: mmap.PAGESIZE])
        assert throughput.memory_gib() - before == pytest.approx(0.25, abs=0.05)
