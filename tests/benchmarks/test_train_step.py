"""What the benchmark of the training step makes of its turns."""

from pathlib import Path

import pytest

from benchmarks.train_step import Bench, command_line, kept
from tests.launching import ROOT


def turn(views: float, ceiling: float = 1e12) -> dict[str, float]:
    return {
        "views_per_s": views, "photos_per_s": views / 10, "operations_per_s": views * 1e9, "step_s": 1.0,
        "data_wait_s": 0.0, "first_step_s": 2.0, "ceiling": ceiling, "memory_gib": 1.0,
    }  # fmt: skip


def bench(tmp_path: Path, *words: str) -> Bench:
    return Bench(command_line().parse_args(list(words)), [], "shards", tmp_path, gpu=False)


def test_ratios_are_of_each_round_and_the_ceiling_is_the_highest_that_was_seen(tmp_path: Path) -> None:
    made = bench(tmp_path)
    # The machine is busy in the second round: all arms lose, and the ratios do not.
    made.turns["plain"] = [turn(100), turn(10), turn(110)]
    made.turns["zero2"] = [turn(90, 2e12), turn(9), turn(99)]
    made.turns["zero2_unpruned"] = [turn(60), turn(6), turn(66)]
    found = made.figures()
    assert (found["plain"], found["zero2"]) == (100, 90)
    assert found["zero2_over_plain"] == pytest.approx(0.9) and found["pruning_speedup"] == pytest.approx(1.5)
    assert found["ceiling_tflops"] == 2.0
    assert found["zero2_of_ceiling"] == pytest.approx(90e9 / 2e12, abs=1e-4)


def test_parts_of_a_step_are_told_beside_it(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.facts["compile"] = True
    made.turns["zero2"] = [turn(90, 2e12), {**turn(90, 2e12), "first_step_s": 31.0}]
    made.parts = [{"forward": 1.3e12, "augment_ms": 40.0, "augment_size": 518, "augment_step_ms": 80.0}] * 2
    found = made.figures()
    assert found["forward_of_ceiling"] == pytest.approx(0.65) and found["compile_s"] == 30.0
    assert (found["augment_ms"], found["augment_size"], found["augment_share"]) == (40.0, 518, pytest.approx(0.08))


def test_parts_that_were_not_measured_are_null(tmp_path: Path) -> None:
    made = bench(tmp_path, "--arms", "plain")
    made.turns["plain"] = [turn(100)]
    found = made.figures()
    assert all(found[k] is None for k in ("forward_of_ceiling", "augment_ms", "augment_share", "compile_s"))


def test_an_arm_that_did_not_run_has_no_ratio(tmp_path: Path) -> None:
    made = bench(tmp_path, "--arms", "zero2")
    made.turns["zero2"] = [turn(90)]
    assert made.figures()["zero2_over_plain"] is None


def test_the_arms_differ_in_what_they_are_named_for(tmp_path: Path) -> None:
    made = bench(tmp_path)
    plain, zero, unpruned = (made._config(arm) for arm in ("plain", "zero2", "zero2_unpruned"))
    assert plain.engine.ds_config == "none" and zero.engine.ds_config == str(ROOT / "ds_configs/zero2_bf16_cpu.json")
    assert (zero.model.keep_ratio, unpruned.model.keep_ratio) == (pytest.approx(2 / 3), 1.0)
    assert zero.model.weights == "random" and zero.model.backbone == "efficientnet_lite0"


def test_resident_batches_come_again_without_a_wait() -> None:
    from dataclasses import dataclass

    @dataclass
    class Small:
        number: int
        wait_s: float

    again = kept(iter([Small(0, 3.0), Small(1, 3.0), Small(2, 3.0)]), 2)  # type: ignore[arg-type, list-item]
    assert [(b.number, b.wait_s) for b in (next(again) for _ in range(4))] == [(0, 0.0), (1, 0.0), (0, 0.0), (1, 0.0)]
