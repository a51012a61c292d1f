"""The page on scale is what the calculation says, and its formulas are what real processes showed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import scaling, scaling_real

OPENING = {
    "held_bytes_per_photo": 200,
    "most_bytes_per_photo": 300,
    "file_bytes_per_photo": 130,
    "seconds_per_photo": 2e-6,
}
ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_calculation_says(capsys):
    spec = importlib.util.spec_from_file_location("generate_scaling", ROOT / "docs" / "generate_scaling.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.main(["--check"]) == 0, capsys.readouterr().out


def test_formulas_are_what_real_processes_showed():
    found = [scaling.agreement(real) for real in json.loads(scaling.MEASURED.read_text())["real_processes"]]
    assert [line["processes"] for line in found] == [1, 2, 4]
    for line in found[1:]:
        assert all(value == pytest.approx(1, abs=0.01) for name, value in line.items() if name != "processes"), line


def test_the_simulated_cache_is_what_real_processes_fetched():
    found = [scaling.read_agreement(real) for real in json.loads(scaling.MEASURED.read_text())["real_reads"]]
    assert [(line["processes"], bool(line["window"])) for line in found] == [
        (n, windowed) for windowed in (False, True) for n in scaling_real.PROCESSES
    ]
    for line in found:
        assert line["fetched"] == pytest.approx(1, abs=0.05), line


def test_starts_take_the_time_of_the_bytes_that_are_read_before():
    """Storage was slow there: what a process does beside waiting for it is small."""
    for line in json.loads(scaling.MEASURED.read_text())["real_starts"]:
        assert 0.9 < line["opening_s"] / line["expected_opening_s"] < 1.5, line
        # ranks do not ask at the same instant: the longest wait lies between a rank's own shards and those of all
        assert 0.9 / line["processes"] < line["first_wait_s"] / line["expected_first_wait_s"] < 1.5, line


def test_real_processes_fetch_what_the_simulation_says(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_real, "STEPS", 4)
    monkeypatch.setattr(scaling_real, "CACHED", 6)
    shards, many = tmp_path / "shards", 10_000
    scaling_real.build_shards(shards, 64, 64, "--samples-per-shard", str(scaling_real.PER_SHARD))
    found = scaling.read_agreement(scaling_real.reads(2, shards, tmp_path / "reads", 0))
    assert found["fetched"] == pytest.approx(1, abs=0.15)
    scaling_real.repeated(shards, tmp_path / "many", many)
    opening = scaling_real.opening(tmp_path / "many", many)
    assert (
        100 < opening["file_bytes_per_photo"] < opening["held_bytes_per_photo"] < opening["most_bytes_per_photo"] < 1000
    )


def test_bytes_on_the_wire_are_those_of_a_ring():
    given = {"all_reduce": 800, "all_gather": 100}
    assert scaling.on_the_wire(given, 1) == 0
    assert scaling.on_the_wire(given, 2) == 800 + 50
    assert scaling.on_the_wire(given, 1024) == pytest.approx(2 * 800 + 100, rel=0.001)
    assert scaling.on_the_wire({"reduce_scatter": 800, "all_gather": 100}, 2) == 400 + 50


def test_the_cache_drops_the_least_recently_used():
    assert scaling.cache_hits([1, 2, 1, 3, 1, 2], 2) == pytest.approx(2 / 6)  # 3 drops 2, so 2 is fetched again
    assert scaling.cache_hits([1, 2, 3] * 10, 3) == pytest.approx(27 / 30)


def test_a_data_set_within_the_cache_is_fetched_once_and_a_large_one_never_hits():
    small = scaling.data_plane(50_000, 8, 600_000, OPENING)
    assert small["cache_shards"] >= small["shards"] and small["cache_hits"] > 0.9
    large = scaling.data_plane(10**8, 8, 600_000, OPENING)
    assert large["cache_hits"] < 0.01 and large["remote_bytes_per_photo"] > 100 * large["local_bytes_per_photo"]


def test_memory_falls_with_processes_down_to_what_each_holds_whole():
    one, many = (sum(scaling.held(1000, gpus).values()) for gpus in (1, 10**6))
    assert one == 22 * 1000 and many == pytest.approx(6 * 1000, rel=0.001)


def test_efficiency_only_falls():
    step = {"parameters": 10**9, "micro_steps": 4, "views_per_micro_step": 24, "views_per_s": 70.0}
    steps = [scaling.step_of(gpus, step) for gpus in (1, 16, 64, 1024)]
    assert steps[0]["efficiency"] == 1 and np.all(np.diff([s["efficiency"] for s in steps]) < 0)
    assert np.all(np.diff([s["views_per_s"] for s in steps]) > 0)
    assert all(s["efficiency_each"] < s["efficiency"] for s in steps[1:]), "held gradients travel once"


def test_buckets_are_those_of_the_engine_on_gpus():
    given = json.loads((ROOT / "ds_configs" / "zero2_bf16.json").read_text())
    assert scaling.bucket_elements() == given["zero_optimization"]["reduce_bucket_size"]
    step = {
        "parameters": 2 * scaling.bucket_elements() + 1,
        "micro_steps": 1,
        "views_per_micro_step": 1,
        "views_per_s": 1,
    }
    hop = scaling.ASSUMED["latency of one hop of a ring, microseconds"] * 1e-6
    found = scaling.step_of(2, step)
    assert found["latency_s"] == pytest.approx(2 * hop), "a reduce-scatter and a gather, one hop each"
    wire = scaling.on_the_wire(scaling.payload_each(step["parameters"], 1), 2) / (
        scaling.ASSUMED["wire within a node, GB/s per GPU"] * 1e9
    )
    assert 1 / found["efficiency_each"] - 1 == pytest.approx(wire + 7 * hop), (
        "three buckets, two hops each, and the gather"
    )


def test_every_backbone_of_the_configurations_is_on_the_page():
    for path in sorted((ROOT / "launch" / "configs").glob("*.yaml")):
        name = yaml.safe_load(path.read_text()).get("model", {}).get("backbone", "auto")
        assert name == "auto" or name in scaling.BACKBONES, path.name


def test_windows_fetch_less_than_the_exact_order():
    row = scaling.data_plane(10**7, 1024, 600_000, OPENING)
    default, small = (row[f"remote_bytes_per_photo_{window}"] for window in scaling.WINDOWS)
    assert small < default < 0.5 * row["remote_bytes_per_photo"]


def test_a_result_of_the_trainer_itself_replaces_the_prototype(tmp_path):
    prototype = json.loads(scaling.MEASURED.read_text())["gpu_step"]
    assert "prototype" in prototype["origin"]
    figures = {
        "gpu": False, "device": "a GPU", "backbone": prototype["backbone"], "accumulation": 4, "zero2": 50.0,
        "zero2_detail": {"step_s": 1.92, "peak_memory_gib": 70.0},
    }  # fmt: skip
    record = {"date": "2026-01-02", "commit": "abc", "command": "a command", "figures": figures}
    (tmp_path / "2026-01-03-train_step.json").write_text(json.dumps(record))
    assert scaling.gpu_step(prototype, tmp_path) == prototype, "a CPU's says nothing of a GPU"
    (tmp_path / "2026-01-02-train_step.json").write_text(json.dumps(record | {"figures": figures | {"gpu": True}}))
    found = scaling.gpu_step(prototype, tmp_path)
    assert (found["views_per_s"], found["memory_gib"], found["views_per_micro_step"]) == (50.0, 70.0, 24.0)
    assert "2026-01-02" in found["origin"] and "prototype" not in found["origin"]
