"""The newest dated results reach the bars that the project set itself; a renewed result that falls short is noticed.

Nothing is measured here.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.fairness import GAP_LIMIT, HISTOGRAM_LIMIT
from benchmarks.results import newest

RESULTS = newest()
BARS = [
    ("demo", "chosen_mcc", 0.70), ("demo", "ensemble_mcc", 0.70),
    ("augment", "over_kornia_512", 8), ("augment", "over_kornia_noplasma_512", 2), ("augment", "over_torchvision_512", 1),
    ("augment", "over_kornia_128", 8), ("augment", "over_kornia_noplasma_128", 2), ("augment", "over_torchvision_128", 1),
    ("blocks", "attention_speedup", 1), ("blocks", "moe_speedup", 1), ("loader", "of_limit", 0.9),
    ("loader", "over_webdataset", 1), ("loader", "over_torch_dataset", 1), ("loader", "over_webdataset_pil", 1),
    ("loader", "over_litdata", 1), ("loader", "over_streaming", 1), ("order", "positions_per_s", 1e6),
    ("folds", "speedup", 8), ("tta", "speedup", 5), ("fairness", "gap", GAP_LIMIT),
    ("photographs", "low", -0.03), ("train_step", "zero2_over_plain", 0.98), ("build", "ratio", 0.7),
]  # fmt: skip
"""(benchmark, figure, least value)."""


def figures(name: str) -> dict[str, Any]:
    """Of the newest result; skips where there is none."""
    if name not in RESULTS:
        pytest.skip(f"no dated result of {name}")
    found: dict[str, Any] = RESULTS[name]["figures"]
    return found


@pytest.mark.parametrize(("name", "figure", "least"), BARS)
def test_the_newest_result_reaches_its_bar(name: str, figure: str, least: float) -> None:
    found = figures(name)
    if figure not in found and name == "loader":
        pytest.skip("measured without --peers-venv")
    assert found[figure] >= least, f"{RESULTS[name]['date']}: {figure} of {name}"


def test_the_demo_and_the_drawing_of_a_thousand_photos_are_quick() -> None:
    assert figures("demo")["minutes"] <= 12
    assert figures("build")["seconds_to_draw_1000"] < 60


def test_the_demo_sees_more_than_metadata_tell() -> None:
    found = figures("demo")
    assert min(found["chosen_mcc"], found["ensemble_mcc"]) > found["metadata_mcc"]


def test_colour_alone_does_not_tell_on_the_embedded_benchmark() -> None:
    found = figures("fairness")
    assert found["histogram_mcc"] < HISTOGRAM_LIMIT and found["gate_histogram"] and found["gate_tiles"]


def test_a_checkpoint_hardly_stops_the_loop() -> None:
    assert figures("resume")["stall_share"] < 0.05


def test_no_kill_changed_a_run() -> None:
    found = figures("kills")
    assert found["kills"] >= 100 and found["differing_curves"] == 0
