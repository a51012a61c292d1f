"""The page on scale is what the calculation says, and its formulas are what real processes showed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scaling

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_calculation_says(capsys):
    spec = importlib.util.spec_from_file_location("generate_scaling", ROOT / "docs" / "generate_scaling.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.main(["--check"]) == 0, capsys.readouterr().out


def test_formulas_are_what_real_processes_showed():
    found = scaling.figures()["agreement"]
    assert [line["processes"] for line in found] == [1, 2, 4]
    for line in found[1:]:
        assert all(value == pytest.approx(1, abs=0.01) for name, value in line.items() if name != "processes"), line


def test_bytes_on_the_wire_are_those_of_a_ring():
    given = {"all_reduce": 800, "all_gather": 100}
    assert scaling.on_the_wire(given, 1) == 0
    assert scaling.on_the_wire(given, 2) == 800 + 50
    assert scaling.on_the_wire(given, 1024) == pytest.approx(2 * 800 + 100, rel=0.001)


def test_the_cache_drops_the_least_recently_used():
    assert scaling.cache_hits([1, 2, 1, 3, 1, 2], 2) == pytest.approx(2 / 6)  # 3 drops 2, so 2 is fetched again
    assert scaling.cache_hits([1, 2, 3] * 10, 3) == pytest.approx(27 / 30)


def test_a_data_set_within_the_cache_is_fetched_once_and_a_large_one_never_hits():
    small = scaling.data_plane(50_000, 8, 600_000, 240)
    assert small["cache_shards"] >= small["shards"] and small["cache_hits"] > 0.9
    large = scaling.data_plane(10**8, 8, 600_000, 240)
    assert large["cache_hits"] < 0.01 and large["remote_bytes_per_photo"] > 100 * large["local_bytes_per_photo"]


def test_memory_falls_with_processes_down_to_what_each_holds_whole():
    one, many = (sum(scaling.held(1000, gpus).values()) for gpus in (1, 10**6))
    assert one == 22 * 1000 and many == pytest.approx(6 * 1000, rel=0.001)


def test_efficiency_only_falls():
    step = {"parameters": 10**9, "micro_steps": 4, "views_per_micro_step": 24, "views_per_s": 70.0}
    steps = [scaling.step_of(gpus, step) for gpus in (1, 16, 64, 1024)]
    assert steps[0]["efficiency"] == 1 and np.all(np.diff([s["efficiency"] for s in steps]) < 0)
    assert np.all(np.diff([s["views_per_s"] for s in steps]) > 0)
