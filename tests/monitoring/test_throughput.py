"""Operations and utilisation by hand; memory of a real process."""

import mmap
from pathlib import Path

import pytest

from roadwork.monitoring import throughput


def test_operations_of_vit_h_plus_are_the_measured_ones():
    per_view = throughput.view_operations(parameters=840_510_000, tokens=1029, depth=32, width=1280)
    assert per_view == pytest.approx(1.90e12, rel=0.005)


def test_utilisation_reproduces_a_measured_row():
    # 72.8 views/s of ViT-H+ training against 797 TFLOP/s: 0.521 in the project's measurements
    per_view = 3 * throughput.view_operations(840_510_000, 1029, 32, 1280)
    assert throughput.utilisation(72.8 * per_view, 1.0, 797e12) == pytest.approx(0.521, abs=0.002)
    assert throughput.utilisation(1.0, 0.0, 1.0) == 0.0


def test_memory_is_that_of_the_process():
    before = throughput.memory_gib()  # the largest so far, which other tests of this process may have set
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    room = int(before * 2**30) - resident
    with mmap.mmap(-1, room + 256 * 2**20) as block:
        block[:: mmap.PAGESIZE] = b"x" * len(block[:: mmap.PAGESIZE])
        assert throughput.memory_gib() - before == pytest.approx(0.25, abs=0.05)
